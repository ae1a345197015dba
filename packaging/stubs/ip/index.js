// Stands in for ip: bittorrent-tracker's UDP server parser imports it, which Rackswarm never runs.
exports.toString = function toString() {
  throw new Error('Cannot format an address: this build of bittorrent-tracker has no UDP server')
}
