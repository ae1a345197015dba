// Stands in for webrtc-polyfill: without these names webtorrent runs over TCP alone (WEBRTC_SUPPORT is false).
export const RTCPeerConnection = undefined
export const RTCSessionDescription = undefined
export const RTCIceCandidate = undefined
export default {}
