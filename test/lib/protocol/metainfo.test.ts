import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { test } from 'node:test'
import { promisify } from 'node:util'
import createTorrent from 'create-torrent'
import { infoHashToHex } from '../../../lib/protocol/infohash.ts'
import { parseTorrent, pieceLengthFor, writeBlobInfo, writeTorrent } from '../../../lib/protocol/metainfo.ts'
import { answersOrRefuses, spoilt } from '../../support/fuzz.ts'

const create = promisify(
  createTorrent as unknown as (
    input: Buffer,
    options: Record<string, unknown>,
    done: (error: Error | null, torrent: Uint8Array) => void,
  ) => void,
)
const mebibyte = 1024 * 1024

test('the torrent of a blob is the one that create-torrent makes', async () => {
  for (const length of [1, 262_143, 262_144, 262_145, 3 * mebibyte, 5 * mebibyte + 17]) {
    const bytes = Buffer.alloc(length, 'rackswarm')
    const sha256Hex = createHash('sha256').update(bytes).digest('hex')
    const pieceLength = pieceLengthFor(length)
    const pieces: Buffer[] = []
    for (let at = 0; at < length; at += pieceLength)
      pieces.push(
        createHash('sha1')
          .update(bytes.subarray(at, at + pieceLength))
          .digest(),
      )
    const ours = parseTorrent(
      writeTorrent(writeBlobInfo({ sha256Hex, length, pieces: Buffer.concat(pieces) }), {
        announce: 'http://t/announce',
      }),
    )
    const theirs = parseTorrent(
      await create(bytes, {
        name: sha256Hex,
        private: true,
        pieceLength,
        announceList: [['http://t/announce']],
      }),
    )
    assert.equal(infoHashToHex(ours.infoHash), infoHashToHex(theirs.infoHash), `${length} bytes`)
  }
})

test('pieces are at most 1500 until they are 16 MiB', () => {
  for (let length = 1; length < 2 ** 45; length = length * 3 + 1) {
    const pieceLength = pieceLengthFor(length)
    assert.ok(
      Number.isInteger(Math.log2(pieceLength)) && pieceLength >= 262_144 && pieceLength <= 16 * mebibyte,
    )
    assert.ok(Math.ceil(length / pieceLength) <= 1500 || pieceLength === 16 * mebibyte)
    if (pieceLength > 262_144) assert.ok(Math.ceil(length / (pieceLength / 2)) > 1500)
  }
})

test('parseTorrent() answers or throws ClientError, whatever the bytes', () => {
  const info = writeBlobInfo({ sha256Hex: 'a'.repeat(64), length: 300_000, pieces: Buffer.alloc(40, 7) })
  answersOrRefuses(
    spoilt([writeTorrent(info, { announce: 'http://t/a', urlList: ['http://w/'] })]),
    parseTorrent,
  )
})

test('names that would leave the directory are refused', () => {
  const pieces = Buffer.alloc(20)
  for (const name of ['..', '.', '', 'a/b', 'a\\b', 'a\0b'])
    assert.throws(
      () => parseTorrent(writeTorrent(writeBlobInfo({ sha256Hex: name, length: 5, pieces }), {})),
      /info\.name/,
    )
})
