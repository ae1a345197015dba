// create-torrent 6 ships no types; this is the part that deployctl uses.
declare module 'create-torrent' {
  interface Options {
    name: string
    /** Bytes. */
    pieceLength: number
    private: boolean
    announceList: string[][]
    createdBy: string
  }
  export default function createTorrent(
    input: string,
    options: Options,
    done: (error: Error | null, torrent: Uint8Array) => void,
  ): void
}
