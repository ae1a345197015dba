// Hosts of one network, on one machine: each a network namespace with an address of its own. Needs root, and Debian's iproute2.
import type { ChildProcess } from 'node:child_process'
import { execFile, spawn } from 'node:child_process'
import { randomInt } from 'node:crypto'
import { once } from 'node:events'
import { promisify } from 'node:util'
import type { Owner } from './tracker.ts'

const ip = async (...args: string[]) => promisify(execFile)('ip', args)

/** An IPv4 and an IPv6 address of one interface. */
export interface Addresses {
  readonly ipv4: string
  readonly ipv6: string
}

export interface Namespace extends Addresses {
  readonly name: string
  /** Runs a command in it, until it ends or the test does. Its stdin and stdout are pipes. */
  spawn(command: string, args: readonly string[]): RunningChild
}

export type RunningChild = ReturnType<typeof spawnIn>

export interface Network {
  /** The test's own end of the bridge: what listens there is reached from every namespace, and it reaches them all. `name` is its interface. */
  readonly bridge: Addresses & { readonly name: string }
  /** Makes so many namespaces on the bridge. At the end of the test their processes are killed and they are removed. */
  readonly addNamespaces: (t: Owner, count: number) => Promise<Namespace[]>
}

/** Subnets that are tried before it gives up. */
const subnetTries = 20

/** Makes a bridge with a subnet of its own, and removes it at the end. */
export async function startNetwork(t: Owner): Promise<Network> {
  const { name, addressesOf } = await claimSubnet(t)
  const bridge = addressesOf(1)
  await ip('address', 'add', `${bridge.ipv4}/24`, 'dev', name)
  await ip('address', 'add', `${bridge.ipv6}/64`, 'dev', name, 'nodad')
  await ip('link', 'set', name, 'up')
  let number = 1
  return {
    bridge: { ...bridge, name },
    addNamespaces: async (owner, count) => {
      const numbers = Array.from({ length: count }, () => ++number)
      return Promise.all(
        numbers.map(async (each) => addNamespace(owner, name, `${name}-${each}`, addressesOf(each))),
      )
    },
  }
}

async function addNamespace(
  t: Owner,
  bridge: string,
  name: string,
  addresses: Addresses,
): Promise<Namespace> {
  const children: RunningChild[] = []
  await ip('netns', 'add', name)
  t.after(async () => {
    await Promise.all(children.map(kill))
    // Otherwise the cable goes some time after its namespace.
    await ip('link', 'delete', name).catch(() => undefined)
    await ip('netns', 'delete', name)
  })
  await ip('link', 'add', name, 'type', 'veth', 'peer', 'name', 'eth0', 'netns', name)
  await ip('link', 'set', name, 'master', bridge, 'up')
  await ip('-n', name, 'address', 'add', `${addresses.ipv4}/24`, 'dev', 'eth0')
  await ip('-n', name, 'address', 'add', `${addresses.ipv6}/64`, 'dev', 'eth0', 'nodad')
  await ip('-n', name, 'link', 'set', 'lo', 'up')
  await ip('-n', name, 'link', 'set', 'eth0', 'up')
  return {
    ...addresses,
    name,
    spawn: (command, args) => {
      const child = spawnIn(name, command, args)
      children.push(child)
      return child
    },
  }
}

/** The bridge's name is the claim: of tests that choose the same subnet at once only one can make it. */
async function claimSubnet(t: Owner) {
  for (let tries = 0; tries < subnetTries; tries++) {
    const [high, low] = [randomInt(64, 256), randomInt(256)]
    const { stdout } = await ip('-oneline', 'address', 'show', 'to', `10.${high}.${low}.0/24`)
    if (stdout !== '') continue
    const name = `rs-${high}-${low}`
    // Without an address of its own a bridge takes one from its cables, and another as they go: who knew the old one reaches nobody.
    const mac = ['02', '00', '0a', hex(high), hex(low), '01'].join(':')
    try {
      await ip('link', 'add', name, 'address', mac, 'type', 'bridge')
    } catch (error) {
      if (String(error).includes('File exists')) continue
      throw error
    }
    t.after(async () => {
      await ip('link', 'delete', name)
    })
    const addressesOf = (number: number): Addresses => ({
      ipv4: `10.${high}.${low}.${number}`,
      ipv6: `fd00:${high.toString(16)}:${low.toString(16)}::${number.toString(16)}`,
    })
    return { name, addressesOf }
  }
  throw new Error(`Cannot make a network: ${subnetTries} subnets of 10.0.0.0/8 are taken`)
}

function hex(byte: number): string {
  return byte.toString(16).padStart(2, '0')
}

/** `ip netns exec` becomes the command: the process id is that of the command. */
function spawnIn(namespace: string, command: string, args: readonly string[]) {
  return spawn('ip', ['netns', 'exec', namespace, command, ...args], { stdio: ['pipe', 'pipe', 'inherit'] })
}

async function kill(child: ChildProcess): Promise<void> {
  if (child.pid === undefined || child.exitCode !== null || child.signalCode !== null) return
  const closed = once(child, 'close')
  child.kill('SIGKILL')
  await closed
}
