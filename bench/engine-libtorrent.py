# One libtorrent session for bench/engine.ts, which speaks the lines of engine-process.ts: `seed|fetch TORRENT DIRECTORY`.
# A fetch also says `flushed`, once what is done is in its file.
import sys
import libtorrent as lt

mode, torrent, directory = sys.argv[1:4]

settings = lt.high_performance_seed()
settings.update({
    'listen_interfaces': '127.0.0.1:0',
    'enable_dht': False,
    'enable_lsd': False,
    'enable_upnp': False,
    'enable_natpmp': False,
    'enable_outgoing_utp': False,
    'enable_incoming_utp': False,
    'allow_multiple_connections_per_ip': True,
    'out_enc_policy': int(lt.enc_policy.pe_disabled),
    'in_enc_policy': int(lt.enc_policy.pe_disabled),
    # It dials on its tick: left at 500 ms, a fetch would stand still for the first half second.
    'tick_interval': 50,
    'alert_mask': int(lt.alert_category.error | lt.alert_category.status | lt.alert_category.storage),
})
session = lt.session(settings)


def wait_for(kind):
    while True:
        session.wait_for_alert(1000)
        for alert in session.pop_alerts():
            if isinstance(alert, kind):
                return
            if isinstance(alert, (lt.torrent_error_alert, lt.file_error_alert, lt.listen_failed_alert)):
                sys.exit(str(alert.message()))


def add():
    params = lt.add_torrent_params()
    params.ti = lt.torrent_info(torrent)
    params.save_path = directory
    # Left to its queue, the torrent would wait for the next look at that.
    params.flags &= ~(lt.torrent_flags.auto_managed | lt.torrent_flags.paused)
    return session.add_torrent(params)


wait_for(lt.listen_succeeded_alert)
if mode == 'seed':
    add()
    wait_for(lt.torrent_finished_alert)
print('ready', session.listen_port(), flush=True)
if mode == 'fetch':
    port = int(sys.stdin.readline().split()[1])
    handle = add()
    handle.connect_peer(('127.0.0.1', port))
    wait_for(lt.torrent_finished_alert)
    print('done', flush=True)
    handle.flush_cache()
    wait_for(lt.cache_flushed_alert)
    print('flushed', flush=True)
sys.stdin.read()
