// BEP 15 over connected sockets, many datagrams to a system call.
#define _GNU_SOURCE
#include "load.h"

#include <arpa/inet.h>
#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#define BATCH 16
#define RECEIVE_BATCH 64
#define SLOTS 65536
#define PACKET_MAX 1500
#define RECEIVE_BUFFER_BYTES (4 * 1024 * 1024)
// BEP 15: a connection id counts for two minutes, and a client uses it for one.
#define CONNECTION_ID_NS (60 * NS_PER_SECOND)
#define CONNECTION_TRIES 5
#define EXPIRE_EVERY_NS 10000000ull
// A transaction id is a slot and how often the slot was used; this bit says connect instead.
#define CONNECT_TRANSACTION 0x80000000u
#define NONE UINT32_MAX

// One announce under way; a doubly linked list for each socket, oldest first.
struct slot {
    uint64_t job, intended_ns, sent_ns;
    uint32_t previous, next, socket;
    uint16_t uses;
    bool busy, connecting;
};

struct udp_socket {
    int fd;
    uint64_t connection_id, connected_ns, connect_sent_ns;
    uint32_t oldest, newest;
    int queued;
    uint8_t *packets;
    struct iovec vectors[BATCH];
    struct mmsghdr messages[BATCH];
};

static struct slot *slots;
static uint32_t free_slots[SLOTS], free_count;
static struct udp_socket *sockets;
static uint32_t socket_count, *dirty, dirty_count;
static int epoll_fd;
static uint64_t *lost_jobs, lost_count;
// BEP 41 options of each swarm, where it has a token.
static struct { uint8_t *bytes; size_t length; } *suffixes;
static uint8_t received[RECEIVE_BATCH][2048];
static struct mmsghdr receive_messages[RECEIVE_BATCH];

static void open_socket(uint32_t index);
static void write_suffix(uint64_t index);
static void start_announce(uint64_t job, uint64_t intended_ns, uint64_t now);
static void queue_announce(uint32_t number);
static uint8_t *queue_packet(uint32_t index, size_t length);
static void flush(uint32_t index);
static void flush_all(void);
static void receive(uint32_t index, struct phase *phase);
static void handle(uint32_t index, const uint8_t *bytes, size_t length, struct phase *phase, uint64_t now);
static bool check_reply(const uint8_t *bytes, size_t length, struct stats *stats);
static void expire(struct phase *phase, uint64_t now);
static void release(uint32_t number);
static void queue_connect(uint32_t index, uint32_t transaction);

void open_udp(void) {
    epoll_fd = epoll_create1(0);
    slots = allocate(SLOTS * sizeof *slots);
    lost_jobs = allocate(SLOTS * sizeof *lost_jobs);
    for (uint32_t i = 0; i < SLOTS; i++) free_slots[free_count++] = SLOTS - 1 - i;
    static struct iovec vectors[RECEIVE_BATCH];
    for (int i = 0; i < RECEIVE_BATCH; i++) {
        vectors[i] = (struct iovec){received[i], sizeof received[i]};
        receive_messages[i].msg_hdr = (struct msghdr){.msg_iov = &vectors[i], .msg_iovlen = 1};
    }
    if (options.tokens_file != NULL) {
        suffixes = allocate(options.swarms * sizeof *suffixes);
        for (uint64_t i = 0; i < options.swarms; i++) write_suffix(i);
    }
    socket_count = (uint32_t)(options.addresses * options.sockets);
    sockets = allocate(socket_count * sizeof *sockets);
    dirty = allocate(socket_count * sizeof *dirty);
    for (uint32_t i = 0; i < socket_count; i++) open_socket(i);
}

// Sockets of one address lie one behind the other. Returns when the tracker has given it a connection id.
static void open_socket(uint32_t index) {
    struct udp_socket *socket_ = &sockets[index];
    socket_->oldest = socket_->newest = NONE;
    socket_->packets = allocate(BATCH * PACKET_MAX);
    for (int i = 0; i < BATCH; i++) {
        socket_->vectors[i] = (struct iovec){socket_->packets + i * PACKET_MAX, 0};
        socket_->messages[i].msg_hdr = (struct msghdr){.msg_iov = &socket_->vectors[i], .msg_iovlen = 1};
    }
    int fd = socket_->fd = socket(options.server.ss_family, SOCK_DGRAM | SOCK_NONBLOCK, 0);
    if (fd < 0) fail("cannot open a socket: %s", strerror(errno));
    int bytes = RECEIVE_BUFFER_BYTES;
    if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof bytes) != 0)
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof bytes);
    struct sockaddr_in source;
    if (source_address((int)index / options.sockets, &source) &&
        bind(fd, (struct sockaddr *)&source, sizeof source) != 0)
        fail("cannot bind: %s", strerror(errno));
    if (connect(fd, (struct sockaddr *)&options.server, options.server_length) != 0)
        fail("cannot connect: %s", strerror(errno));
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = index};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0) fail("epoll: %s", strerror(errno));
    if (options.blind || options.connect_each) return;
    struct phase none = {.stats = allocate(sizeof(struct stats))};
    for (int i = 0; i < CONNECTION_TRIES && socket_->connected_ns == 0; i++) {
        queue_connect(index, CONNECT_TRANSACTION | index);
        flush_all();
        struct pollfd readable = {.fd = fd, .events = POLLIN};
        if (poll(&readable, 1, 1000) == 1) receive(index, &none);
    }
    free(none.stats);
    if (socket_->connected_ns == 0) fail("the tracker gave no connection id in %d s", CONNECTION_TRIES);
}

// BEP 41: URLData (2) in pieces of at most 255 bytes, then the end of the options (0).
static void write_suffix(uint64_t index) {
    char url[PACKET_MAX];
    size_t length = (size_t)snprintf(url, sizeof url, "/announce?jwt=%s", swarms[index].jwt);
    if (length > 1200) fail("a token is too long for a datagram");
    uint8_t *out = suffixes[index].bytes = allocate(length + 32);
    for (size_t at = 0; at < length; at += 255) {
        size_t part = length - at < 255 ? length - at : 255;
        *out++ = 2;
        *out++ = (uint8_t)part;
        memcpy(out, url + at, part);
        out += part;
    }
    *out++ = 0;
    suffixes[index].length = (size_t)(out - suffixes[index].bytes);
}

void run_udp(struct phase *phase) {
    struct stats *stats = phase->stats;
    uint64_t total = options.swarms * options.peers, sent = 0, now = now_ns(), expired_ns = now;
    stats->start_ns = phase->start_ns > 0 ? phase->start_ns : now;
    double cpu_before = cpu_seconds();
    bool open_loop = phase->rate > 0, over = false;
    while (true) {
        now = now_ns();
        if (!over && phase->until_ns > 0 && now >= phase->until_ns) {
            over = true;
            stats->end_ns = phase->until_ns;
            stats->cpu_seconds = cpu_seconds() - cpu_before;
            // In a closed loop the next phase takes over what is under way.
            if (!open_loop) return;
        }
        uint64_t intended_ns = 0;
        if (open_loop) {
            for (;; sent++) {
                intended_ns = stats->start_ns + (uint64_t)((double)sent * 1e9 / phase->rate);
                if (intended_ns > now || intended_ns >= phase->until_ns) break;
                if (free_count == 0) stats->lost++;
                else start_announce(next_measured_job(total), intended_ns, now);
            }
            if (over && free_count == SLOTS) return;
        } else {
            while ((int)(SLOTS - free_count) < options.window) {
                if (!phase->fill) start_announce(next_measured_job(total), now, now);
                else if (lost_count > 0) start_announce(lost_jobs[--lost_count], now, now);
                else if (sent < total) start_announce(sent++, now, now);
                else break;
            }
            if (phase->fill && free_count == SLOTS) {
                stats->end_ns = now;
                stats->cpu_seconds = cpu_seconds() - cpu_before;
                return;
            }
        }
        flush_all();
        uint64_t wait_ns = options.spin && !open_loop && !phase->fill ? 0 : EXPIRE_EVERY_NS;
        if (open_loop && !over && intended_ns < now + wait_ns) wait_ns = intended_ns > now ? intended_ns - now : 0;
        struct epoll_event events[256];
        struct timespec wait = {0, (long)wait_ns};
        int ready = epoll_pwait2(epoll_fd, events, 256, &wait, NULL);
        for (int i = 0; i < ready; i++) receive(events[i].data.u32, phase);
        if (now - expired_ns >= EXPIRE_EVERY_NS) {
            expire(phase, now);
            expired_ns = now;
        }
    }
}

static void start_announce(uint64_t job, uint64_t intended_ns, uint64_t now) {
    uint32_t number = free_slots[--free_count];
    struct slot *slot = &slots[number];
    uint32_t index = (uint32_t)(job_address(job) * options.sockets + (int)(mix(job) % (uint64_t)options.sockets));
    struct udp_socket *socket_ = &sockets[index];
    *slot = (struct slot){.job = job, .intended_ns = intended_ns, .sent_ns = now, .socket = index, .next = NONE,
                          .previous = socket_->newest, .uses = (slot->uses + 1) & 0x7fff, .busy = true};
    if (socket_->newest == NONE) socket_->oldest = number;
    else slots[socket_->newest].next = number;
    socket_->newest = number;
    if (options.connect_each) {
        slot->connecting = true;
        queue_connect(index, (uint32_t)slot->uses << 16 | number);
        return;
    }
    if (!options.blind && now - socket_->connected_ns > CONNECTION_ID_NS &&
        now - socket_->connect_sent_ns > NS_PER_SECOND) {
        socket_->connect_sent_ns = now;
        queue_connect(index, CONNECT_TRANSACTION | index);
    }
    queue_announce(number);
}

static void queue_announce(uint32_t number) {
    struct slot *slot = &slots[number];
    uint64_t swarm = job_swarm(slot->job);
    size_t suffix = suffixes == NULL ? 0 : suffixes[swarm].length;
    uint8_t *packet = queue_packet(slot->socket, 98 + suffix);
    memset(packet, 0, 98);
    uint64_t id = sockets[slot->socket].connection_id, left = htobe64(job_seeds(slot->job) ? 0 : 1 << 30);
    uint32_t action = htobe32(1), transaction = htobe32((uint32_t)slot->uses << 16 | number),
             key = (uint32_t)mix(job_peer(slot->job)), numwant = htobe32((uint32_t)options.numwant);
    uint16_t port = htobe16((uint16_t)job_port(slot->job));
    memcpy(packet, &id, 8);
    memcpy(packet + 8, &action, 4);
    memcpy(packet + 12, &transaction, 4);
    memcpy(packet + 16, swarms[swarm].hash, 20);
    write_peer_id(slot->job, packet + 36);
    memcpy(packet + 64, &left, 8);
    memcpy(packet + 88, &key, 4);
    memcpy(packet + 92, &numwant, 4);
    memcpy(packet + 96, &port, 2);
    if (suffix > 0) memcpy(packet + 98, suffixes[swarm].bytes, suffix);
}

static void queue_connect(uint32_t index, uint32_t transaction) {
    uint8_t *packet = queue_packet(index, 16);
    uint64_t magic = htobe64(0x41727101980ull);
    memcpy(packet, &magic, 8);
    memset(packet + 8, 0, 4);
    transaction = htobe32(transaction);
    memcpy(packet + 12, &transaction, 4);
}

static uint8_t *queue_packet(uint32_t index, size_t length) {
    struct udp_socket *socket_ = &sockets[index];
    if (socket_->queued == BATCH) flush(index);
    else if (socket_->queued == 0) dirty[dirty_count++] = index;
    int at = socket_->queued++;
    socket_->vectors[at].iov_len = length;
    return socket_->packets + at * PACKET_MAX;
}

static void flush_all(void) {
    for (uint32_t i = 0; i < dirty_count; i++) flush(dirty[i]);
    dirty_count = 0;
}

static void flush(uint32_t index) {
    static int failures;
    struct udp_socket *socket_ = &sockets[index];
    for (int done = 0; done < socket_->queued;) {
        int sent = sendmmsg(socket_->fd, socket_->messages + done, (unsigned)(socket_->queued - done), 0);
        if (sent > 0) done += sent;
        else if (errno == EAGAIN || errno == ENOBUFS) poll(&(struct pollfd){.fd = socket_->fd, .events = POLLOUT}, 1, 10);
        else if (++failures > 1000) fail("cannot send to %s port %d: %s", options.host, options.port, strerror(errno));
    }
    socket_->queued = 0;
}

static void receive(uint32_t index, struct phase *phase) {
    int count;
    do {
        count = recvmmsg(sockets[index].fd, receive_messages, RECEIVE_BATCH, 0, NULL);
        uint64_t now = now_ns();
        for (int i = 0; i < count; i++) handle(index, received[i], receive_messages[i].msg_len, phase, now);
    } while (count == RECEIVE_BATCH);
}

static void handle(uint32_t index, const uint8_t *bytes, size_t length, struct phase *phase, uint64_t now) {
    struct udp_socket *socket_ = &sockets[index];
    struct stats *stats = phase->stats;
    uint32_t number = socket_->oldest;
    if (!options.blind) {
        uint32_t action, transaction;
        if (length < 8) {
            stats->wrong++;
            fault("a reply of %zu bytes", length);
            return;
        }
        memcpy(&action, bytes, 4);
        memcpy(&transaction, bytes + 4, 4);
        transaction = be32toh(transaction);
        bool connected = be32toh(action) == 0 && length == 16;
        if (transaction == (CONNECT_TRANSACTION | index)) {
            if (connected) {
                memcpy(&socket_->connection_id, bytes + 8, 8);
                socket_->connected_ns = now;
            } else fault("no connection id: action %u, %zu bytes", be32toh(action), length);
            return;
        }
        number = transaction & 0xffff;
        struct slot *slot = &slots[number];
        // Late, and counted as lost.
        if (transaction >> 16 != slot->uses || !slot->busy || slot->socket != index) return;
        if (slot->connecting) {
            if (connected) {
                slot->connecting = false;
                memcpy(&socket_->connection_id, bytes + 8, 8);
                queue_announce(number);
                return;
            }
            fault("no connection id: action %u, %zu bytes", be32toh(action), length);
            stats->wrong++;
            release(number);
            return;
        }
    } else if (number == NONE) return;
    struct slot *slot = &slots[number];
    if (options.blind || check_reply(bytes, length, stats)) {
        stats->answered++;
        stats->bytes += length;
        record(&stats->latency, now - slot->intended_ns);
    }
    release(number);
}

static bool check_reply(const uint8_t *bytes, size_t length, struct stats *stats) {
    uint32_t action;
    memcpy(&action, bytes, 4);
    action = be32toh(action);
    if (action == 3) {
        stats->refused++;
        fault("refused: %.*s", (int)(length - 8), (const char *)bytes + 8);
        return false;
    }
    size_t peer_bytes = options.server.ss_family == AF_INET ? 6 : 18, peers = (length - 20) / peer_bytes;
    uint32_t counts[3];
    if (action != 1 || length < 20 || (length - 20) % peer_bytes != 0 || peers > (size_t)options.numwant) {
        stats->wrong++;
        fault("action %u, %zu bytes, where at most %d peers were asked for", action, length, options.numwant);
        return false;
    }
    // Interval, leechers, seeders: the announcer itself is one of them.
    memcpy(counts, bytes + 8, 12);
    uint32_t interval = be32toh(counts[0]), known = be32toh(counts[1]) + be32toh(counts[2]);
    uint16_t port = 10000;
    if (peers > 0) {
        memcpy(&port, bytes + 20 + peer_bytes - 2, 2);
        port = be16toh(port);
    }
    if (interval == 0 || known == 0 || peers > known || port < 10000 || port > 64999) {
        stats->wrong++;
        fault("interval %u, %u peers known, %zu given, the first with port %u", interval, known, peers, port);
        return false;
    }
    stats->peers += peers;
    if (known > stats->known) stats->known = known;
    return true;
}

static void expire(struct phase *phase, uint64_t now) {
    uint64_t timeout_ns = (uint64_t)options.timeout_ms * 1000000;
    for (uint32_t i = 0; i < socket_count; i++) {
        while (sockets[i].oldest != NONE && now > slots[sockets[i].oldest].sent_ns + timeout_ns) {
            uint32_t number = sockets[i].oldest;
            phase->stats->lost++;
            if (phase->fill) lost_jobs[lost_count++] = slots[number].job;
            release(number);
        }
    }
}

static void release(uint32_t number) {
    struct slot *slot = &slots[number];
    struct udp_socket *socket_ = &sockets[slot->socket];
    if (slot->previous == NONE) socket_->oldest = slot->next;
    else slots[slot->previous].next = slot->next;
    if (slot->next == NONE) socket_->newest = slot->previous;
    else slots[slot->next].previous = slot->previous;
    slot->busy = false;
    free_slots[free_count++] = number;
}
