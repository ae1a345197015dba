// A pre-hook: refuses peers on ports that are not theirs to have, and tells nobody of hosts that are being taken out of service.
import { ClientError, endpointIp, formatIp, parseIp } from 'rackswarm'

/**
 * Options: `port_min`, the lowest port a peer may listen on (1024); `drained`, a list of addresses that nobody is sent to.
 *
 * @type {import('rackswarm').CreatePreHook}
 */
export default function createPortsAndDrains({ port_min: portMin = 1024, drained = [] }, { log }) {
  if (!Number.isInteger(portMin)) throw new Error(`port_min: need a whole number, got ${String(portMin)}`)
  const hidden = readAddresses(drained)
  log.info({ hosts: hidden.size }, 'hosts are drained')
  return {
    name: 'ports-and-drains',
    announce({ announce: { port } }) {
      // The message is the failure reason that the peer sees; the code is for metrics, where codes that are not the tracker's count as
      // `other`.
      if (port < Number(portMin))
        throw new ClientError('bad_port', `port ${port} is below ${String(portMin)}`)
    },
    peers(_request, peers) {
      return hidden.size === 0
        ? peers
        : peers.filter(({ endpoint }) => !hidden.has(formatIp(endpointIp(endpoint))))
    },
  }
}

/**
 * @param {unknown} addresses
 * @returns {Set<string>} in canonical text
 */
function readAddresses(addresses) {
  if (!Array.isArray(addresses)) throw new Error('drained: need a list of addresses')
  return new Set(
    addresses.map((text) => {
      const ip = typeof text === 'string' ? parseIp(text) : undefined
      if (!ip) throw new Error(`drained: ${JSON.stringify(text)} is no address`)
      return formatIp(ip)
    }),
  )
}
