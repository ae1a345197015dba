// Which directories a power failure may leave behind, after the steps of a process.
import { createHash } from 'node:crypto'
import { mkdir, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import type { Step } from './strace.ts'

/**
 * What the disk promises here, and no more:
 *
 * - data of a file is there after a sync of that file; of what was written since, any part may be, and the length may be ahead of
 *   the data, with zeros in between;
 * - a name, new, changed or removed, is there after a sync of its directory; of the changes since, any first few may be;
 * - a rename is there or not, in both of its directories at once; a file is not there because its data is, nor the other way round.
 */
export interface CrashState {
  /** Paths below the root, in order; directories have no content. */
  readonly entries: ReadonlyMap<string, Buffer | undefined>
  /** The same for states with the same entries. */
  readonly id: string
}

interface NameChange {
  readonly at: number
  /** The directory whose order it stands in. */
  readonly directory: Inode
  readonly name: string
  /** What the name stands for from now on; undefined if nothing. */
  readonly inode: Inode | undefined
  /** Of a rename: the name that goes. */
  readonly from: { readonly directory: Inode; readonly name: string } | undefined
}

interface DataChange {
  readonly at: number
  readonly file: Inode
  readonly change:
    | { readonly kind: 'write'; readonly at: number; readonly bytes: Buffer }
    | { readonly kind: 'truncate'; readonly length: number }
}

interface Inode {
  readonly number: number
  /** Names as the process sees them; undefined for a file. */
  readonly names: Map<string, Inode> | undefined
  /** Length of a file as the process sees it. */
  length: number
}

export interface Journal {
  /**
   * States that a power failure just before step `at` may leave: all of them, or where they are too many, the ends and a sample.
   * `skip` is the number of a sync that is left out.
   */
  statesAt(
    at: number,
    options: { random: () => number; statesMax: number; skip?: number | undefined },
  ): Generator<CrashState>
}

/** @throws Error where something below `root` was done in a way that this cannot follow */
export function createJournal(steps: readonly Step[], root: string): Journal {
  let inodes = 0
  const create = (isDirectory: boolean): Inode => ({
    number: inodes++,
    names: isDirectory ? new Map() : undefined,
    length: 0,
  })
  const top = create(true)
  const names: NameChange[] = []
  const data: DataChange[] = []
  const syncs: { at: number; inode: Inode }[] = []

  const walk = (path: string): Inode | undefined => {
    if (path === root) return top
    if (!path.startsWith(`${root}/`)) return undefined
    let inode: Inode | undefined = top
    for (const part of path.slice(root.length + 1).split('/')) inode = inode?.names?.get(part)
    return inode
  }
  const parentOf = (path: string) => {
    const cut = path.lastIndexOf('/')
    return { directory: walk(path.slice(0, cut)), name: path.slice(cut + 1) }
  }
  const name = (at: number, path: string, inode: Inode | undefined, from?: NameChange['from']) => {
    const { directory, name: last } = parentOf(path)
    if (!directory?.names) return
    if (inode) directory.names.set(last, inode)
    else directory.names.delete(last)
    names.push({ at, directory, name: last, inode, from })
  }

  for (const [at, step] of steps.entries()) {
    switch (step.kind) {
      case 'mkdir':
      case 'create':
        if (!walk(step.path)) name(at, step.path, create(step.kind === 'mkdir'))
        break
      case 'remove':
        if (walk(step.path)) name(at, step.path, undefined)
        break
      case 'rename': {
        const inode = walk(step.from)
        const { directory, name: last } = parentOf(step.from)
        if (!inode || !directory) break
        directory.names?.delete(last)
        name(at, step.to, inode, { directory, name: last })
        break
      }
      case 'write': {
        const file = walk(step.path)
        if (!file) break
        const offset = step.at ?? file.length
        file.length = Math.max(file.length, offset + step.bytes.length)
        data.push({ at, file, change: { kind: 'write', at: offset, bytes: step.bytes } })
        break
      }
      case 'truncate': {
        const file = walk(step.path)
        if (!file) break
        file.length = step.length
        data.push({ at, file, change: { kind: 'truncate', length: step.length } })
        break
      }
      case 'sync': {
        const inode = walk(step.path)
        if (inode) syncs.push({ at, inode })
        break
      }
      case 'send':
        break
      case 'other':
        if (step.paths.some((path) => path.startsWith(`${root}/`)))
          throw new Error(`Cannot say what ${step.call} does to ${step.paths.join(', ')}`)
        break
    }
  }

  const contents = createContents()

  return {
    *statesAt(before, { random, statesMax, skip }) {
      const syncedAfter = (at: number, inode: Inode) =>
        syncs.some((sync) => sync.inode === inode && sync.at > at && sync.at < before && sync.at !== skip)
      const nameChanges = names.filter(({ at }) => at < before)
      const dataChanges = data.filter(({ at }) => at < before)
      const keptNames = new Set(
        nameChanges.filter(
          ({ at, directory, from }) =>
            syncedAfter(at, directory) || (from !== undefined && syncedAfter(at, from.directory)),
        ),
      )
      const keptData = new Set(dataChanges.filter(({ at, file }) => syncedAfter(at, file)))
      const loose = [
        ...Map.groupBy(
          nameChanges.filter((change) => !keptNames.has(change)),
          ({ directory }) => directory,
        ).values(),
      ]
      const looseData = [
        ...Map.groupBy(
          dataChanges.filter((change) => !keptData.has(change)),
          ({ file }) => file,
        ).values(),
      ]
      const sizes = [...loose.map((changes) => changes.length + 1), ...looseData.map(dataChoices)]
      for (const choice of choices(sizes, statesMax, random)) {
        const chosenNames = new Set(keptNames)
        for (const [i, changes] of loose.entries())
          for (const change of changes.slice(0, choice[i])) chosenNames.add(change)
        const chosenData = new Set(keptData)
        /** Files that are as long as the process made them, whatever of their data is there. */
        const stretched = new Set<Inode>()
        for (const [i, changes] of looseData.entries()) {
          const pick = choice[loose.length + i] ?? 0
          for (const change of pickData(changes, pick)) chosenData.add(change)
          const [first] = changes
          if (first && pick % 2 === 1) stretched.add(first.file)
        }
        yield build(
          top,
          nameChanges.filter((change) => chosenNames.has(change)),
          (file) => {
            const its = dataChanges.filter((change) => change.file === file)
            const chosen = its.filter((change) => chosenData.has(change))
            return contents(file, chosen, stretched.has(file) ? its : chosen)
          },
        )
      }
    },
  }
}

/** None of the changes, each of them alone, all but each, and all; of each of these the length told or not. */
function dataChoices(changes: readonly DataChange[]): number {
  return changes.length === 1 ? 4 : 2 * (2 + 2 * changes.length)
}

function pickData(changes: readonly DataChange[], pick: number): readonly DataChange[] {
  const which = Math.floor(pick / 2)
  if (which === 0) return []
  if (which === dataChoices(changes) / 2 - 1) return changes
  const one = Math.floor((which - 1) / 2)
  return which % 2 === 0 ? changes.filter((_, i) => i !== one) : changes.filter((_, i) => i === one)
}

/**
 * Ways to choose a number below each size: all of them if they are few. Else nothing and everything; each, the latest first, at
 * some of its numbers with everything or nothing of the others; and as many random ones as are left.
 */
function* choices(sizes: readonly number[], max: number, random: () => number): Generator<number[]> {
  const total = sizes.reduce((product, size) => product * size, 1)
  if (total <= max) {
    for (let i = 0; i < total; i++) {
      let rest = i
      yield sizes.map((size) => {
        const pick = rest % size
        rest = Math.floor(rest / size)
        return pick
      })
    }
    return
  }
  const none = sizes.map(() => 0)
  const all = sizes.map((size) => size - 1)
  yield none
  yield all
  let yielded = 2
  for (const [i, size] of [...sizes.entries()].reverse())
    for (const pick of new Set([0, size - 1, Math.floor(random() * size)]))
      for (const others of [all, none]) {
        if (yielded++ >= max) return
        yield others.with(i, pick)
      }
  for (; yielded < max; yielded++) yield sizes.map((size) => Math.floor(random() * size))
}

interface Content {
  readonly bytes: Buffer
  readonly hash: string
}

function build(top: Inode, names: readonly NameChange[], contentOf: (file: Inode) => Content): CrashState {
  const directories = new Map<Inode, Map<string, Inode>>()
  const namesOf = (inode: Inode) => {
    const known = directories.get(inode) ?? new Map<string, Inode>()
    directories.set(inode, known)
    return known
  }
  for (const { directory, name, inode, from } of names) {
    if (from && namesOf(from.directory).get(from.name) === inode) namesOf(from.directory).delete(from.name)
    if (inode) namesOf(directory).set(name, inode)
    else namesOf(directory).delete(name)
  }
  const entries = new Map<string, Buffer | undefined>()
  const id = createHash('sha256')
  const visit = (inode: Inode, path: string) => {
    for (const [name, child] of [...namesOf(inode)].sort(([a], [b]) => (a < b ? -1 : 1))) {
      const below = path === '' ? name : `${path}/${name}`
      const content = child.names ? undefined : contentOf(child)
      entries.set(below, content?.bytes)
      id.update(`${below}\0${content?.hash ?? 'directory'}\0`)
      if (child.names) visit(child, below)
    }
  }
  visit(top, '')
  return { entries, id: id.digest('hex') }
}

/** The same few contents come in thousands of states. */
function createContents() {
  const known = new Map<string, Content>()
  return (file: Inode, chosen: readonly DataChange[], lengthOf: readonly DataChange[]): Content => {
    const key = [
      file.number,
      ...chosen.map(({ at }) => at),
      'as long as',
      ...lengthOf.map(({ at }) => at),
    ].join(' ')
    const found = known.get(key)
    if (found) return found
    const bytes = apply(chosen)
    const whole = Buffer.concat([bytes], Math.max(bytes.length, apply(lengthOf).length))
    const content = { bytes: whole, hash: createHash('sha256').update(whole).digest('hex') }
    known.set(key, content)
    return content
  }
}

function apply(changes: readonly DataChange[]): Buffer {
  let content: Buffer = Buffer.alloc(0)
  for (const { change } of changes) {
    if (change.kind === 'truncate') {
      content = Buffer.concat([content.subarray(0, change.length)], change.length)
      continue
    }
    const end = change.at + change.bytes.length
    if (content.length < end) content = Buffer.concat([content], end)
    else content = Buffer.from(content)
    change.bytes.copy(content, change.at)
  }
  return content
}

/** Writes a state to an empty directory. */
export async function writeState({ entries }: CrashState, directory: string): Promise<void> {
  for (const [path, content] of entries) {
    if (content === undefined) await mkdir(join(directory, path))
    else await writeFile(join(directory, path), content)
  }
}
