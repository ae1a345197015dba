# One libtorrent session for bench/swarm/foreign.ts: `DIRECTORY ADDRESS`. It says `ready`, reads the path of a torrent, says `done` with the time in
# milliseconds once it has all of it, and goes on seeding.
import sys
import time
import libtorrent as lt

directory, address = sys.argv[1:3]

session = lt.session({
    'listen_interfaces': address + ':6881',
    'enable_dht': False,
    'enable_lsd': False,
    'enable_upnp': False,
    'enable_natpmp': False,
    'enable_outgoing_utp': False,
    'enable_incoming_utp': False,
    'out_enc_policy': int(lt.enc_policy.pe_disabled),
    'in_enc_policy': int(lt.enc_policy.pe_disabled),
    # Left at its default, it would leave half of a fast link unused.
    'unchoke_slots_limit': -1,
    'alert_mask': int(lt.alert_category.error | lt.alert_category.status | lt.alert_category.storage
                      | lt.alert_category.tracker),
})
print('ready', flush=True)
params = lt.add_torrent_params()
params.ti = lt.torrent_info(sys.stdin.readline().strip())
params.save_path = directory
# Left to its queue, the torrent would wait for the next look at that.
params.flags &= ~(lt.torrent_flags.auto_managed | lt.torrent_flags.paused)
handle = session.add_torrent(params)
while True:
    session.wait_for_alert(1000)
    for alert in session.pop_alerts():
        if isinstance(alert, lt.torrent_finished_alert):
            print('done', int(time.time() * 1000), flush=True)
            handle.flush_cache()
        elif isinstance(alert, (lt.torrent_error_alert, lt.file_error_alert, lt.tracker_error_alert)):
            print(alert.message(), flush=True)
