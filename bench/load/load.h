// The load generator of the tracker benchmarks: what its two halves share.
#ifndef LOAD_H
#define LOAD_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#define NS_PER_SECOND 1000000000ull

struct options {
    struct sockaddr_storage server;
    socklen_t server_length;
    const char *host;
    int port;
    // Swarms, and peers in each; a job is one of their swarms * peers announces, swarms counting fastest.
    uint64_t swarms, peers;
    int numwant;
    // One in so many peers is a seeder; 0: none.
    uint64_t seeder_every;
    // Announces under way at most where the pace is the server's (closed loop), and a second where it is ours (open loop).
    int window;
    double rate;
    double warm_seconds, seconds;
    // Announces every peer once before anything is measured.
    bool fill;
    // Source addresses 127.0.x.y, in so many /24 networks; sockets of each.
    int addresses, racks, sockets;
    int timeout_ms;
    const char *tokens_file, *save_tickets_file;
    // Processes whose CPU is counted, all their threads.
    int pids[64];
    int pid_count;
    bool connect_each, blind;
    // Never sleeps in a closed loop: to wake the generator would be at the cost of whoever answers, the more the slower it is.
    bool spin;
    int connections;
    bool new_connections, tls;
    const char *path;
};

struct swarm {
    uint8_t hash[20];
    // From the file of tokens; NULL without.
    char *jwt, *ticket;
};

// Latencies with an error below 1 %: 128 steps in each power of two.
struct histogram {
    uint64_t counts[58 * 128];
    uint64_t count, max;
};

struct stats {
    uint64_t answered, lost, wrong, refused, failed, bytes, peers;
    // Most peers that a reply said its swarm has (UDP).
    uint64_t known;
    uint64_t start_ns, end_ns;
    double cpu_seconds;
    struct histogram latency;
};

extern struct options options;
extern struct swarm *swarms;
// The first fault in words, for the one who reads the result.
extern char first_fault[256];

uint64_t now_ns(void);
uint64_t mix(uint64_t value);
void fault(const char *format, ...) __attribute__((format(printf, 1, 2)));
void fail(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
void *allocate(size_t bytes);
void record(struct histogram *histogram, uint64_t ns);
double cpu_seconds(void);

// What job `job` announces.
static inline uint64_t job_swarm(uint64_t job) { return job % options.swarms; }
static inline uint64_t job_peer(uint64_t job) { return job / options.swarms % options.peers; }
static inline int job_port(uint64_t job) { return 10000 + (int)(job_peer(job) % 55000); }
static inline int job_address(uint64_t job) {
    return (int)((job_peer(job) + job_swarm(job)) % (uint64_t)options.addresses);
}
static inline bool job_seeds(uint64_t job) {
    return options.seeder_every > 0 && job_peer(job) % options.seeder_every == 0;
}
// A peer at random: what has been announced long ago is in no cache.
uint64_t next_measured_job(uint64_t total);
void write_peer_id(uint64_t job, uint8_t out[20]);
// Source address `index`; false where the system shall choose.
bool source_address(int index, struct sockaddr_in *address);

// What to do, and until when: `total` jobs once each, or all that fit before `until_ns`.
struct phase {
    bool fill;
    uint64_t start_ns, until_ns;
    double rate;
    struct stats *stats;
};

void open_udp(void);
void run_udp(struct phase *phase);
void open_http(void);
void run_http(struct phase *phase);

#endif
