// HTTP/1.1, a connection for each announce or connections that are kept, one request at a time on each; with or without TLS.
#define _GNU_SOURCE
#include "load.h"

#include <ctype.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define REQUEST_MAX 8192
#define REPLY_MAX 65536
#define TIMEOUT_NS (10 * NS_PER_SECOND)
#define EXPIRE_EVERY_NS 100000000ull
// So many connections that fail one after the other are no load but a server that is not there.
#define FAILURES_MAX 1000

enum state { CLOSED, IDLE, CONNECTING, SENDING, READING, CLOSING };

struct connection {
    enum state state;
    int fd;
    SSL *tls;
    bool awaits_output;
    // It has carried a reply before this request.
    bool kept;
    // The request under way.
    uint64_t job, intended_ns, sent_ns;
    size_t request_length, request_sent, reply_length;
    // Of the reply, once its head is read.
    size_t head_length, body_length;
    char request[REQUEST_MAX], reply[REPLY_MAX];
};

static struct connection *connections;
static uint32_t *ready, ready_count;
static int epoll_fd, failures_in_a_row;
static uint64_t next_source;
static uint64_t *again_jobs, again_count;
static SSL_CTX *tls_context;
// What stands before the peer id in a request for each swarm.
static char **heads;

static void write_head(uint64_t index);
static void start_request(uint32_t index, uint64_t job, uint64_t intended_ns, uint64_t now, struct phase *phase);
static bool open_connection(struct connection *connection, uint32_t index);
static void write_request(struct connection *connection);
static void advance(uint32_t index, uint32_t events, struct phase *phase);
static bool send_request(struct connection *connection);
static void read_reply(uint32_t index, bool closed, struct phase *phase);
static bool read_head(struct connection *connection, struct stats *stats);
static bool check_body(struct connection *connection, struct stats *stats);
static void finish(uint32_t index);
static void reopen(uint32_t index, struct phase *phase);
static void abandon(uint32_t index, struct phase *phase, const char *why);
static void close_connection(struct connection *connection);
static void want_output(struct connection *connection, uint32_t index, bool wanted);
static ssize_t put(struct connection *connection, const char *bytes, size_t length);
static ssize_t get(struct connection *connection, char *bytes, size_t length);
static bool again(const struct connection *connection, ssize_t result);

void open_http(void) {
    epoll_fd = epoll_create1(0);
    connections = allocate((size_t)options.connections * sizeof *connections);
    ready = allocate((size_t)options.connections * sizeof *ready);
    again_jobs = allocate((size_t)options.connections * sizeof *again_jobs);
    for (int i = options.connections - 1; i >= 0; i--) ready[ready_count++] = (uint32_t)i;
    if (options.tls) {
        tls_context = SSL_CTX_new(TLS_client_method());
        if (tls_context == NULL) fail("cannot use TLS");
        SSL_CTX_set_verify(tls_context, SSL_VERIFY_NONE, NULL);
        SSL_CTX_set_options(tls_context, SSL_OP_IGNORE_UNEXPECTED_EOF);
    }
    if (options.path != NULL) return;
    heads = allocate(options.swarms * sizeof *heads);
    for (uint64_t i = 0; i < options.swarms; i++) write_head(i);
}

static char *escape(char *out, const uint8_t *bytes, size_t length) {
    static const char digits[] = "0123456789ABCDEF";
    for (size_t i = 0; i < length; i++) {
        if (isalnum(bytes[i]) || memchr("-._~", bytes[i], 4) != NULL) *out++ = (char)bytes[i];
        else {
            *out++ = '%';
            *out++ = digits[bytes[i] >> 4];
            *out++ = digits[bytes[i] & 15];
        }
    }
    return out;
}

static void write_head(uint64_t index) {
    char text[REQUEST_MAX], *out = stpcpy(text, "GET /announce?info_hash=");
    const struct swarm *swarm = &swarms[index];
    out = escape(out, swarm->hash, sizeof swarm->hash);
    if ((swarm->jwt == NULL ? 0 : strlen(swarm->jwt)) + 3 * (swarm->ticket == NULL ? 0 : strlen(swarm->ticket)) >
        REQUEST_MAX - 1024)
        fail("a token is too long for a request");
    if (swarm->jwt != NULL) {
        out = stpcpy(out, "&jwt=");
        out = stpcpy(out, swarm->jwt);
    }
    if (swarm->ticket != NULL) {
        out = stpcpy(out, "&trackerid=");
        out = escape(out, (const uint8_t *)swarm->ticket, strlen(swarm->ticket));
    }
    *out = '\0';
    heads[index] = strdup(text);
}

void run_http(struct phase *phase) {
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
            if (!open_loop) return;
        }
        uint64_t intended_ns = 0, wait_ns = options.spin && !open_loop && !phase->fill ? 0 : EXPIRE_EVERY_NS;
        if (open_loop) {
            for (;; sent++) {
                intended_ns = stats->start_ns + (uint64_t)((double)sent * 1e9 / phase->rate);
                // With no connection free it waits, and its latency runs.
                if (intended_ns > now || intended_ns >= phase->until_ns || ready_count == 0) break;
                start_request(ready[--ready_count], next_measured_job(total), intended_ns, now, phase);
            }
            if (over && intended_ns >= phase->until_ns && ready_count == (uint32_t)options.connections) return;
            if (ready_count > 0 && intended_ns < phase->until_ns)
                wait_ns = intended_ns <= now ? 0 : intended_ns - now < wait_ns ? intended_ns - now : wait_ns;
        } else {
            while (ready_count > 0) {
                uint64_t job;
                if (!phase->fill) job = next_measured_job(total);
                else if (again_count > 0) job = again_jobs[--again_count];
                else if (sent < total) job = sent++;
                else break;
                start_request(ready[--ready_count], job, now, now, phase);
            }
            if (phase->fill && ready_count == (uint32_t)options.connections && again_count == 0 && sent == total) {
                stats->end_ns = now;
                stats->cpu_seconds = cpu_seconds() - cpu_before;
                return;
            }
            if (ready_count > 0 && again_count > 0) wait_ns = 0;
        }
        struct epoll_event events[256];
        struct timespec wait = {0, (long)wait_ns};
        int count = epoll_pwait2(epoll_fd, events, 256, &wait, NULL);
        for (int i = 0; i < count; i++) advance(events[i].data.u32, events[i].events, phase);
        if (now - expired_ns < EXPIRE_EVERY_NS) continue;
        expired_ns = now;
        for (uint32_t i = 0; i < (uint32_t)options.connections; i++)
            if (connections[i].state > IDLE && now > connections[i].sent_ns + TIMEOUT_NS)
                abandon(i, phase, connections[i].state == CLOSING ? "the server did not close" : "no reply in time");
    }
}

static void start_request(uint32_t index, uint64_t job, uint64_t intended_ns, uint64_t now, struct phase *phase) {
    struct connection *connection = &connections[index];
    connection->job = job;
    connection->intended_ns = intended_ns;
    connection->sent_ns = now;
    connection->request_sent = connection->reply_length = connection->head_length = 0;
    write_request(connection);
    if (connection->state == CLOSED && !open_connection(connection, index)) {
        abandon(index, phase, strerror(errno));
        return;
    }
    if (connection->state == IDLE) connection->state = SENDING;
    advance(index, 0, phase);
}

static bool open_connection(struct connection *connection, uint32_t index) {
    int fd = socket(options.server.ss_family, SOCK_STREAM | SOCK_NONBLOCK, 0), on = 1;
    if (fd < 0) fail("cannot open a socket: %s", strerror(errno));
    connection->fd = fd;
    // The one request of a connection is not held back anyway.
    if (!options.new_connections) setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    struct sockaddr_in source;
    if (source_address((int)(next_source++ % (uint64_t)options.addresses), &source)) {
        // The port is chosen at connect, where it may serve several destinations.
        setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
        if (bind(fd, (struct sockaddr *)&source, sizeof source) != 0) fail("cannot bind: %s", strerror(errno));
    }
    connection->state = CONNECTING;
    struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP, .data.u32 = index};
    if (connect(fd, (struct sockaddr *)&options.server, options.server_length) != 0 && errno != EINPROGRESS) return false;
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) != 0) fail("epoll: %s", strerror(errno));
    connection->awaits_output = false;
    if (tls_context == NULL) return true;
    connection->tls = SSL_new(tls_context);
    if (connection->tls == NULL || SSL_set_fd(connection->tls, fd) != 1) fail("cannot use TLS");
    SSL_set_connect_state(connection->tls);
    return true;
}

static void write_request(struct connection *connection) {
    char *out = connection->request, *end = out + REQUEST_MAX;
    if (options.path != NULL) out += snprintf(out, (size_t)(end - out), "GET %s", options.path);
    else {
        uint8_t peer_id[20];
        write_peer_id(connection->job, peer_id);
        out += snprintf(out, (size_t)(end - out),
                        "%s&peer_id=%.20s&port=%d&uploaded=0&downloaded=0&left=%s&compact=1&numwant=%d",
                        heads[job_swarm(connection->job)], (const char *)peer_id, job_port(connection->job),
                        job_seeds(connection->job) ? "0" : "1073741824", options.numwant);
    }
    out += snprintf(out, (size_t)(end - out), " HTTP/1.1\r\nHost: %s:%d\r\nUser-Agent: load\r\n%s\r\n", options.host,
                    options.port, options.new_connections ? "Connection: close\r\n" : "");
    connection->request_length = (size_t)(out - connection->request);
}

static void advance(uint32_t index, uint32_t events, struct phase *phase) {
    struct connection *connection = &connections[index];
    if (connection->state == CLOSED) return;
    if (connection->state == IDLE) {
        // Nothing was asked: the server closes a connection that it need not keep.
        close_connection(connection);
        return;
    }
    if (connection->state == CONNECTING || connection->state == SENDING) {
        if (!send_request(connection)) {
            if (connection->kept) reopen(index, phase);
            else abandon(index, phase, strerror(errno));
            return;
        }
        bool sent = connection->request_sent == connection->request_length;
        want_output(connection, index, !sent && (connection->tls == NULL || SSL_want_write(connection->tls)));
        if (!sent) return;
        connection->state = READING;
        // There is no reply yet: the next event tells of it.
        return;
    }
    read_reply(index, (events & EPOLLRDHUP) != 0 && connection->tls == NULL, phase);
}

static bool send_request(struct connection *connection) {
    while (connection->request_sent < connection->request_length) {
        ssize_t sent = put(connection, connection->request + connection->request_sent,
                           connection->request_length - connection->request_sent);
        if (sent <= 0) {
            bool waits = again(connection, sent);
            if (waits && connection->tls == NULL) connection->state = SENDING;
            return waits;
        }
        connection->request_sent += (size_t)sent;
    }
    return true;
}

// `closed`: the server has closed, and what it sent before is there to be read.
static void read_reply(uint32_t index, bool closed, struct phase *phase) {
    struct connection *connection = &connections[index];
    struct stats *stats = phase->stats;
    while (true) {
        ssize_t length = get(connection, connection->reply + connection->reply_length,
                             REPLY_MAX - 1 - connection->reply_length);
        if (length < 0 && again(connection, length)) return;
        if (connection->state == CLOSING) {
            if (length > 0) abandon(index, phase, "bytes after the reply");
            else finish(index);
            return;
        }
        if (length <= 0 && connection->kept && connection->reply_length == 0) {
            reopen(index, phase);
            return;
        }
        if (length <= 0) {
            abandon(index, phase, length < 0 ? strerror(errno) : "the server closed before it replied");
            return;
        }
        connection->reply_length += (size_t)length;
        connection->reply[connection->reply_length] = '\0';
        if (connection->head_length == 0 && !read_head(connection, stats)) {
            if (connection->head_length == 0 && connection->reply_length < REPLY_MAX - 1) continue;
            abandon(index, phase, "cannot read the head of the reply");
            return;
        }
        size_t whole = connection->head_length + connection->body_length;
        if (connection->reply_length < whole) continue;
        if (connection->reply_length > whole) {
            abandon(index, phase, "bytes after the reply");
            return;
        }
        if (check_body(connection, stats)) {
            stats->answered++;
            stats->bytes += whole;
            record(&stats->latency, now_ns() - connection->intended_ns);
            failures_in_a_row = 0;
        }
        if (!options.new_connections) {
            finish(index);
            return;
        }
        // It is over when the server has closed, which is part of its work.
        connection->state = CLOSING;
        if (closed) finish(index);
        // Its end is not here yet: to ask at once would be a system call for nothing.
        if (connection->tls == NULL) return;
    }
}

// False with a `head_length` of 0: it has not ended yet.
static bool read_head(struct connection *connection, struct stats *stats) {
    char *end = strstr(connection->reply, "\r\n\r\n");
    if (end == NULL) return false;
    connection->head_length = (size_t)(end + 4 - connection->reply);
    if (strncmp(connection->reply, "HTTP/1.1 200", 12) != 0) {
        stats->wrong++;
        fault("%.40s", connection->reply);
        return false;
    }
    for (char *line = connection->reply; line < end; line = strstr(line, "\r\n") + 2) {
        if (strncasecmp(line, "content-length:", 15) == 0) {
            connection->body_length = strtoul(line + 15, NULL, 10);
            return connection->body_length < REPLY_MAX - 1 - connection->head_length;
        }
    }
    return false;
}

// The number and the text after `key` in a bencoded dictionary; good enough for a key of which no value holds the like.
static char *find_text(char *body, size_t body_length, const char *key, size_t *length) {
    char *at = memmem(body, body_length, key, strlen(key));
    if (at == NULL) return NULL;
    char *text;
    *length = strtoul(at + strlen(key), &text, 10);
    return *text == ':' && *length <= (size_t)(body + body_length - text - 1) ? text + 1 : NULL;
}

static bool check_body(struct connection *connection, struct stats *stats) {
    if (options.path != NULL) return true;
    char *body = connection->reply + connection->head_length;
    size_t length, key_length = connection->body_length;
    char *text = find_text(body, key_length, "14:failure reason", &length);
    if (text != NULL) {
        stats->refused++;
        fault("refused: %.*s", (int)length, text);
        return false;
    }
    bool inet = options.server.ss_family == AF_INET;
    text = find_text(body, key_length, inet ? "5:peers" : "6:peers6", &length);
    size_t peers = text == NULL ? 0 : length / (inet ? 6 : 18);
    bool has_peers = text != NULL || find_text(body, key_length, "5:peers", &length) != NULL;
    if (body[0] != 'd' || body[key_length - 1] != 'e' || !has_peers || length % 6 != 0 || peers > (size_t)options.numwant) {
        stats->wrong++;
        fault("a reply of %zu bytes with %zu peers, where at most %d were asked for", key_length, peers, options.numwant);
        return false;
    }
    stats->peers += peers;
    if (options.save_tickets_file != NULL) {
        struct swarm *swarm = &swarms[job_swarm(connection->job)];
        text = find_text(body, key_length, "10:tracker id", &length);
        if (text != NULL) {
            free(swarm->ticket);
            swarm->ticket = strndup(text, length);
        }
    }
    return true;
}

// The connection can take the next request.
static void finish(uint32_t index) {
    struct connection *connection = &connections[index];
    if (options.new_connections) close_connection(connection);
    else {
        connection->state = IDLE;
        connection->kept = true;
    }
    ready[ready_count++] = index;
}

// The server gave up an idle connection just as the request left: a client asks again on a new one.
static void reopen(uint32_t index, struct phase *phase) {
    struct connection *connection = &connections[index];
    close_connection(connection);
    connection->request_sent = 0;
    if (!open_connection(connection, index)) abandon(index, phase, strerror(errno));
    else advance(index, 0, phase);
}

static void abandon(uint32_t index, struct phase *phase, const char *why) {
    phase->stats->failed++;
    fault("%s", why);
    if (++failures_in_a_row > FAILURES_MAX) fail("cannot load %s port %d: %s", options.host, options.port, why);
    if (phase->fill && connections[index].state != CLOSING) again_jobs[again_count++] = connections[index].job;
    close_connection(&connections[index]);
    ready[ready_count++] = index;
}

static void close_connection(struct connection *connection) {
    if (connection->tls != NULL) SSL_free(connection->tls);
    connection->tls = NULL;
    connection->kept = false;
    close(connection->fd);
    connection->state = CLOSED;
}

static void want_output(struct connection *connection, uint32_t index, bool wanted) {
    if (wanted == connection->awaits_output) return;
    connection->awaits_output = wanted;
    struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP | (wanted ? EPOLLOUT : 0u), .data.u32 = index};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_MOD, connection->fd, &event) != 0) fail("epoll: %s", strerror(errno));
}

static ssize_t put(struct connection *connection, const char *bytes, size_t length) {
    if (connection->tls == NULL) return send(connection->fd, bytes, length, 0);
    ERR_clear_error();
    return SSL_write(connection->tls, bytes, (int)length);
}

// 0: the server has closed.
static ssize_t get(struct connection *connection, char *bytes, size_t length) {
    if (connection->tls == NULL) return recv(connection->fd, bytes, length, 0);
    ERR_clear_error();
    int result = SSL_read(connection->tls, bytes, (int)length);
    return result > 0 ? result : SSL_get_error(connection->tls, result) == SSL_ERROR_ZERO_RETURN ? 0 : -1;
}

static bool again(const struct connection *connection, ssize_t result) {
    if (connection->tls == NULL) return errno == EAGAIN || errno == ENOTCONN || errno == EINPROGRESS;
    int error = SSL_get_error(connection->tls, (int)result);
    return error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE;
}
