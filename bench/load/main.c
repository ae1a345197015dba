// load udp|http|hashes --port N [options]: announces to a tracker as fast as it answers, or at a fixed rate, checks every
// reply, and prints one line of JSON. See load.h for what the options mean.
#include "load.h"

#include <arpa/inet.h>
#include <getopt.h>
#include <math.h>
#include <netdb.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

struct options options = {
    .host = "127.0.0.1", .swarms = 1000, .peers = 50, .numwant = 30, .seeder_every = 10, .window = 128,
    .warm_seconds = 2, .seconds = 4, .addresses = 1, .racks = 1, .sockets = 16, .timeout_ms = 1000, .connections = 64,
};
struct swarm *swarms;
char first_fault[256];

static void read_options(int count, char **arguments);
static void make_swarms(void);
static void read_tokens(void);
static void save_tickets(void);
static void resolve_server(void);
static void print_stats(const char *name, const struct stats *stats, const char *after);

int main(int count, char **arguments) {
    const char *what = count > 1 ? arguments[1] : "";
    bool udp = strcmp(what, "udp") == 0;
    if (!udp && strcmp(what, "http") != 0 && strcmp(what, "hashes") != 0) fail("usage: load udp|http|hashes [options]");
    read_options(count - 1, arguments + 1);
    signal(SIGPIPE, SIG_IGN);
    // Sleeps end 50 us late otherwise.
    prctl(PR_SET_TIMERSLACK, 1);
    if (options.tokens_file != NULL) read_tokens();
    else make_swarms();
    if (strcmp(what, "hashes") == 0) {
        for (uint64_t i = 0; i < options.swarms; i++) {
            for (int byte = 0; byte < 20; byte++) printf("%02x", swarms[i].hash[byte]);
            putchar('\n');
        }
        return 0;
    }
    resolve_server();
    void (*run)(struct phase *) = udp ? run_udp : run_http;
    if (udp) open_udp();
    else open_http();

    struct stats *fill = allocate(sizeof *fill), *warm = allocate(sizeof *warm), *window = allocate(sizeof *window);
    if (options.fill) run(&(struct phase){.fill = true, .stats = fill});
    if (options.seconds > 0) {
        // The warm-up has the pace of what follows it, so that no backlog is carried over.
        struct phase phase = {.start_ns = now_ns(), .rate = options.rate, .stats = warm};
        phase.until_ns = phase.start_ns + (uint64_t)(options.warm_seconds * 1e9);
        if (options.warm_seconds > 0) run(&phase);
        phase = (struct phase){.start_ns = now_ns(), .rate = options.rate, .stats = window};
        phase.until_ns = phase.start_ns + (uint64_t)(options.seconds * 1e9);
        run(&phase);
    }
    if (options.save_tickets_file != NULL) save_tickets();
    printf("{");
    print_stats("fill", fill, ",");
    print_stats("warm", warm, ",");
    print_stats("window", window, ",");
    for (char *at = first_fault; *at != '\0'; at++)
        if (*at < ' ' || *at > '~' || *at == '"' || *at == '\\') *at = '?';
    printf("\"firstFault\":\"%s\"}\n", first_fault);
    return 0;
}

enum { SWARMS = 256, PEERS, NUMWANT, SEEDER_EVERY, WINDOW, RATE, WARM, SECONDS, FILL, ADDRESSES, RACKS, SOCKETS, TIMEOUT,
       TOKENS, SAVE_TICKETS, PIDS, CONNECT_EACH, BLIND, SPIN, CONNECTIONS, NEW_CONNECTIONS, TLS, PATH, HOST, PORT };

static void read_options(int count, char **arguments) {
    static const struct option known[] = {
        {"host", 1, 0, HOST}, {"port", 1, 0, PORT}, {"swarms", 1, 0, SWARMS}, {"peers", 1, 0, PEERS},
        {"numwant", 1, 0, NUMWANT}, {"seeder-every", 1, 0, SEEDER_EVERY}, {"window", 1, 0, WINDOW},
        {"rate", 1, 0, RATE}, {"warm", 1, 0, WARM}, {"seconds", 1, 0, SECONDS}, {"fill", 0, 0, FILL},
        {"addresses", 1, 0, ADDRESSES}, {"racks", 1, 0, RACKS}, {"sockets", 1, 0, SOCKETS},
        {"timeout-ms", 1, 0, TIMEOUT}, {"tokens", 1, 0, TOKENS}, {"save-tickets", 1, 0, SAVE_TICKETS},
        {"pids", 1, 0, PIDS}, {"connect-each", 0, 0, CONNECT_EACH}, {"blind", 0, 0, BLIND}, {"spin", 0, 0, SPIN},
        {"connections", 1, 0, CONNECTIONS}, {"new-connections", 0, 0, NEW_CONNECTIONS}, {"tls", 0, 0, TLS},
        {"path", 1, 0, PATH}, {0},
    };
    for (int option; (option = getopt_long(count, arguments, "", known, NULL)) != -1;) {
        switch (option) {
        case HOST: options.host = optarg; break;
        case PORT: options.port = atoi(optarg); break;
        case SWARMS: options.swarms = strtoull(optarg, NULL, 10); break;
        case PEERS: options.peers = strtoull(optarg, NULL, 10); break;
        case NUMWANT: options.numwant = atoi(optarg); break;
        case SEEDER_EVERY: options.seeder_every = strtoull(optarg, NULL, 10); break;
        case WINDOW: options.window = atoi(optarg); break;
        case RATE: options.rate = atof(optarg); break;
        case WARM: options.warm_seconds = atof(optarg); break;
        case SECONDS: options.seconds = atof(optarg); break;
        case FILL: options.fill = true; break;
        case ADDRESSES: options.addresses = atoi(optarg); break;
        case RACKS: options.racks = atoi(optarg); break;
        case SOCKETS: options.sockets = atoi(optarg); break;
        case TIMEOUT: options.timeout_ms = atoi(optarg); break;
        case TOKENS: options.tokens_file = optarg; break;
        case SAVE_TICKETS: options.save_tickets_file = optarg; break;
        case PIDS:
            for (char *pid = strtok(optarg, ","); pid != NULL; pid = strtok(NULL, ",")) {
                if (options.pid_count == 64) fail("--pids: at most 64");
                options.pids[options.pid_count++] = atoi(pid);
            }
            break;
        case CONNECT_EACH: options.connect_each = true; break;
        case SPIN: options.spin = true; break;
        case BLIND: options.blind = true; break;
        case CONNECTIONS: options.connections = atoi(optarg); break;
        case NEW_CONNECTIONS: options.new_connections = true; break;
        case TLS: options.tls = true; break;
        case PATH: options.path = optarg; break;
        default: fail("unknown option, see above");
        }
    }
    if (options.swarms < 1 || options.peers < 1 || options.peers > 55000)
        fail("--swarms and --peers: at least 1, and at most 55000 peers, since each has a port");
    if (options.window < 1 || options.window > 16384) fail("--window: 1 to 16384");
    if (options.connections < 1 || options.connections > 4096) fail("--connections: 1 to 4096");
    if (options.addresses < 1 || options.racks < 1 || options.racks > 250 || options.addresses > options.racks * 250 ||
        options.sockets < 1 || options.addresses * options.sockets > 4096)
        fail("--addresses, --racks, --sockets: at least 1; 250 racks of 250 addresses, and 4096 sockets, at most");
    if (options.connect_each && options.blind) fail("--connect-each and --blind exclude each other");
}

static void make_swarms(void) {
    swarms = allocate(options.swarms * sizeof *swarms);
    for (uint64_t i = 0; i < options.swarms; i++) {
        uint64_t words[3] = {mix(3 * i + 1), mix(3 * i + 2), mix(3 * i + 3)};
        memcpy(swarms[i].hash, words, 20);
    }
}

// Lines of `infohash TAB jwt [TAB ticket]`; each is a swarm.
static void read_tokens(void) {
    FILE *file = fopen(options.tokens_file, "r");
    if (file == NULL) fail("cannot open %s", options.tokens_file);
    char *line = NULL;
    size_t size = 0, room = 1024;
    uint64_t count = 0;
    swarms = allocate(room * sizeof *swarms);
    while (getline(&line, &size, file) > 0) {
        line[strcspn(line, "\n")] = '\0';
        if (count == room) {
            swarms = realloc(swarms, 2 * room * sizeof *swarms);
            if (swarms == NULL) fail("out of memory");
            memset(swarms + room, 0, room * sizeof *swarms);
            room *= 2;
        }
        struct swarm *swarm = &swarms[count++];
        char *rest = line, *hex = strsep(&rest, "\t"), *jwt = strsep(&rest, "\t"), *ticket = strsep(&rest, "\t");
        for (int i = 0; i < 20; i++)
            if (sscanf(hex + 2 * i, "%2hhx", &swarm->hash[i]) != 1)
                fail("%s: line %lu: need 40 hex digits", options.tokens_file, count);
        if (jwt == NULL) fail("%s: line %lu: need a token after a TAB", options.tokens_file, count);
        swarm->jwt = strdup(jwt);
        swarm->ticket = ticket == NULL ? NULL : strdup(ticket);
    }
    free(line);
    fclose(file);
    if (count == 0) fail("%s holds no token", options.tokens_file);
    options.swarms = count;
}

static void save_tickets(void) {
    FILE *file = fopen(options.save_tickets_file, "w");
    if (file == NULL) fail("cannot write %s", options.save_tickets_file);
    for (uint64_t i = 0; i < options.swarms; i++) {
        for (int byte = 0; byte < 20; byte++) fprintf(file, "%02x", swarms[i].hash[byte]);
        fprintf(file, "\t%s", swarms[i].jwt == NULL ? "" : swarms[i].jwt);
        fprintf(file, swarms[i].ticket == NULL ? "\n" : "\t%s\n", swarms[i].ticket);
    }
    if (fclose(file) != 0) fail("cannot write %s", options.save_tickets_file);
}

static void resolve_server(void) {
    char port[8];
    snprintf(port, sizeof port, "%d", options.port);
    struct addrinfo *found, hints = {.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV};
    if (getaddrinfo(options.host, port, &hints, &found) != 0) fail("--host %s: need an address", options.host);
    memcpy(&options.server, found->ai_addr, found->ai_addrlen);
    options.server_length = found->ai_addrlen;
    freeaddrinfo(found);
}

bool source_address(int index, struct sockaddr_in *address) {
    if (options.server.ss_family != AF_INET || options.addresses == 1) return false;
    uint32_t rack = (uint32_t)(index % options.racks), host = (uint32_t)(index / options.racks);
    *address = (struct sockaddr_in){
        .sin_family = AF_INET, .sin_addr.s_addr = htonl(0x7f000000u | (1 + rack) << 8 | (1 + host))};
    return true;
}

uint64_t next_measured_job(uint64_t total) {
    static uint64_t next;
    if (next == 0) next = mix(now_ns()) >> 1;
    return mix(next++) % total;
}

void write_peer_id(uint64_t job, uint8_t out[20]) {
    static const char digits[] = "0123456789abcdef";
    memcpy(out, "-LD0001-", 8);
    uint64_t value = mix(job_peer(job) * 0x10001 + job_swarm(job));
    for (int i = 8; i < 20; i++, value >>= 4) out[i] = (uint8_t)digits[value & 15];
}

uint64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * NS_PER_SECOND + (uint64_t)time.tv_nsec;
}

// splitmix64.
uint64_t mix(uint64_t value) {
    value += 0x9e3779b97f4a7c15ull;
    value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9ull;
    value = (value ^ value >> 27) * 0x94d049bb133111ebull;
    return value ^ value >> 31;
}

void record(struct histogram *histogram, uint64_t ns) {
    int shift = ns < 128 ? 0 : 64 - __builtin_clzll(ns) - 8;
    uint64_t index = ns < 128 ? ns : (uint64_t)(shift + 1) * 128 + (ns >> shift) - 128;
    histogram->counts[index]++;
    histogram->count++;
    if (ns > histogram->max) histogram->max = ns;
}

static double quantile_us(const struct histogram *histogram, double quantile) {
    uint64_t wanted = (uint64_t)ceil(quantile * (double)histogram->count), seen = 0;
    for (uint64_t index = 0; index < sizeof histogram->counts / sizeof *histogram->counts; index++) {
        seen += histogram->counts[index];
        if (seen == 0 || seen < wanted) continue;
        uint64_t top = index < 128 ? index : ((index % 128 + 129) << (index / 128 - 1)) - 1;
        return (double)(top < histogram->max ? top : histogram->max) / 1e3;
    }
    return 0;
}

// User and system time of the processes, as /proc/PID/stat has it.
double cpu_seconds(void) {
    double sum = 0;
    for (int i = 0; i < options.pid_count; i++) {
        char path[32], text[1024];
        snprintf(path, sizeof path, "/proc/%d/stat", options.pids[i]);
        FILE *file = fopen(path, "r");
        if (file == NULL) fail("process %d has ended", options.pids[i]);
        size_t length = fread(text, 1, sizeof text - 1, file);
        fclose(file);
        text[length] = '\0';
        // The second field is the name in brackets and may hold anything.
        char *after = strrchr(text, ')');
        unsigned long user, system;
        if (after == NULL || sscanf(after + 2, "%*c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %lu %lu", &user, &system) != 2)
            fail("cannot read %s", path);
        sum += (double)(user + system) / (double)sysconf(_SC_CLK_TCK);
    }
    return sum;
}

static void print_stats(const char *name, const struct stats *stats, const char *after) {
    if (stats->end_ns == 0) {
        printf("\"%s\":null%s", name, after);
        return;
    }
    double seconds = (double)(stats->end_ns - stats->start_ns) / 1e9;
    double answered = stats->answered > 0 ? (double)stats->answered : 1;
    printf("\"%s\":{\"announces\":%lu,\"seconds\":%.4f,\"rate\":%.1f,\"cpuSeconds\":%.2f,\"lost\":%lu,\"wrong\":%lu,"
           "\"refused\":%lu,\"failed\":%lu,\"bytesPerReply\":%.1f,\"peersPerReply\":%.2f,\"known\":%lu,\"latencyUs\":{",
           name, stats->answered, seconds, (double)stats->answered / seconds, stats->cpu_seconds, stats->lost,
           stats->wrong, stats->refused, stats->failed, (double)stats->bytes / answered, (double)stats->peers / answered, stats->known);
    static const struct { const char *name; double quantile; } quantiles[] = {
        {"p50", .5}, {"p90", .9}, {"p99", .99}, {"p999", .999}};
    for (int i = 0; i < 4; i++)
        printf("\"%s\":%.1f,", quantiles[i].name, quantile_us(&stats->latency, quantiles[i].quantile));
    printf("\"max\":%.1f}}%s", (double)stats->latency.max / 1e3, after);
}

void *allocate(size_t bytes) {
    void *memory = calloc(1, bytes);
    if (memory == NULL) fail("out of memory");
    return memory;
}

void fault(const char *format, ...) {
    if (first_fault[0] != '\0') return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(first_fault, sizeof first_fault, format, arguments);
    va_end(arguments);
}

void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "load: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    exit(1);
}
