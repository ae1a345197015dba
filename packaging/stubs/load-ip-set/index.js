// Stands in for load-ip-set: webtorrent imports it for its `blocklist` option, which Rackswarm never sets.
export default function loadIPSet() {
  throw new Error('Cannot load an IP blocklist: this build of webtorrent has none')
}
