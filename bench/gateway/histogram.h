// Times in ns, counted in buckets that are 1/64 of a power of two wide (under 1.6 % of their value), by slices of time.
#pragma once

#include "wire.h"

#define SUB 64
#define BUCKETS 2432  // up to 2^43 ns, over two hours
#define SLICES 4096

enum kind { TRANSIT, FIRST, FIRST_TRANSIT, KINDS };
static const char *const KIND_NAMES[KINDS] = {"transit", "first", "first_transit"};

struct slice {
    uint64_t tokens;
    uint32_t count[KINDS][BUCKETS];
};

static inline int bucket_of(uint64_t ns) {
    if (ns < SUB) return (int)ns;
    int e = 63 - __builtin_clzll(ns);
    int found = (e - 5) * SUB + (int)(ns >> (e - 6) & (SUB - 1));
    return found < BUCKETS ? found : BUCKETS - 1;
}

// The middle of a bucket.
static inline uint64_t bucket_ns(int bucket) {
    if (bucket < 2 * SUB) return (uint64_t)bucket;
    int e = bucket / SUB + 5;
    return ((uint64_t)(SUB + bucket % SUB) << (e - 6)) + ((1ull << (e - 6)) / 2);
}

static inline void print_counts(const uint64_t *counts) {
    const char *comma = "";
    printf("[");
    for (int b = 0; b < BUCKETS; b++)
        if (counts[b]) {
            printf("%s[%llu,%llu]", comma, (unsigned long long)bucket_ns(b), (unsigned long long)counts[b]);
            comma = ",";
        }
    printf("]");
}

static inline uint64_t quantile(const uint64_t *counts, uint64_t total, double share) {
    uint64_t rank = (uint64_t)(share * (double)total + 0.999999), seen = 0;
    for (int b = 0; b < BUCKETS; b++)
        if ((seen += counts[b]) >= (rank ? rank : 1)) return bucket_ns(b);
    return 0;
}

// {"count", "p50" … "max", "buckets"} over all slices.
static inline void print_histogram(struct slice **slices, enum kind kind) {
    static uint64_t counts[BUCKETS];
    uint64_t total = 0;
    memset(counts, 0, sizeof counts);
    for (int s = 0; s < SLICES; s++)
        for (int b = 0; slices[s] && b < BUCKETS; b++) counts[b] += slices[s]->count[kind][b];
    for (int b = 0; b < BUCKETS; b++) total += counts[b];
    static const struct { const char *name; double share; } shares[] = {
        {"p50", 0.5}, {"p90", 0.9}, {"p99", 0.99}, {"p999", 0.999}, {"max", 1},
    };
    printf("\"%s\":{\"count\":%llu,", KIND_NAMES[kind], (unsigned long long)total);
    for (size_t i = 0; i < sizeof shares / sizeof *shares; i++)
        printf("\"%s\":%llu,", shares[i].name, (unsigned long long)quantile(counts, total, shares[i].share));
    printf("\"buckets\":");
    print_counts(counts);
    printf("}");
}

// [{"slice", "tokens", "transit": [[ns, count], …], …}, …]: those in which anything came.
static inline void print_slices(struct slice **slices) {
    static uint64_t counts[BUCKETS];
    const char *comma = "";
    printf("[");
    for (int s = 0; s < SLICES; s++) {
        if (!slices[s]) continue;
        printf("%s{\"slice\":%d,\"tokens\":%llu", comma, s, (unsigned long long)slices[s]->tokens);
        for (int kind = 0; kind < KINDS; kind++) {
            for (int b = 0; b < BUCKETS; b++) counts[b] = slices[s]->count[kind][b];
            printf(",\"%s\":", KIND_NAMES[kind]);
            print_counts(counts);
        }
        printf("}");
        comma = ",";
    }
    printf("]");
}
