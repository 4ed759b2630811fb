// What the load generator counts, and how it is printed.
#pragma once

#include "histogram.h"
#include "wire.h"

#define MISSING 64

// What is known of the order of a stream's tokens.
struct order {
    uint32_t expected, missing[MISSING];
    int missing_count;
};

static uint64_t began, slice_ns, requests, answers, errors, tokens, lost, doubled, reordered, foreign, connects;
static char first_error[1200];
static struct slice *slices[SLICES];
static struct events closes;  // by the load itself

static struct slice *slice_at(uint64_t now) {
    uint64_t s = (now - began) / slice_ns;
    if (s >= SLICES) s = SLICES - 1;
    if (!slices[s] && !(slices[s] = calloc(1, sizeof **slices))) die("memory");
    return slices[s];
}

static void count_time(enum kind kind, uint64_t now, uint64_t ns) { slice_at(now)->count[kind][bucket_of(ns)]++; }

static void error(const char *what, size_t n, int status) {
    errors++;
    if (!*first_error) snprintf(first_error, sizeof first_error, "%d %.*s", status, (int)(n < 1000 ? n : 1000), what);
}

// A token's place in its stream: the next one, one that was left out before, or one that was there already.
static void count_place(struct order *o, uint32_t sequence) {
    if (sequence >= o->expected) {
        for (uint32_t each = o->expected; each < sequence; each++, lost++)
            if (o->missing_count < MISSING) o->missing[o->missing_count++] = each;
        o->expected = sequence + 1;
        return;
    }
    for (int i = 0; i < o->missing_count; i++)
        if (o->missing[i] == sequence) {
            o->missing[i] = o->missing[--o->missing_count];
            lost--, reordered++;
            return;
        }
    doubled++;
}

static void print_text(const char *text) {
    putchar('"');
    for (; *text; text++)
        if (*text == '"' || *text == '\\') printf("\\%c", *text);
        else if ((unsigned char)*text < 32) printf("\\u%04x", *text);
        else putchar(*text);
    putchar('"');
}

static void print_number(const char *name, uint64_t value) { printf("\"%s\":%llu,", name, (unsigned long long)value); }

static void report(const char *mode) {
    printf("{\"mode\":\"%s\",\"seconds\":%.6f,", mode, (double)(now_ns() - began) / 1e9);
    print_number("began", began);
    print_number("slice_ns", slice_ns);
    print_number("requests", requests);
    print_number("answers", answers);
    print_number("errors", errors);
    print_number("tokens", tokens);
    print_number("lost", lost);
    print_number("doubled", doubled);
    print_number("reordered", reordered);
    print_number("foreign", foreign);
    print_number("connects", connects);
    printf("\"first_error\":");
    print_text(first_error);
    for (int kind = 0; kind < KINDS; kind++) printf(","), print_histogram(slices, kind);
    printf(",\"slices\":");
    print_slices(slices);
    printf(",\"closes\":[");
    for (size_t i = 0; i < closes.count; i++)
        printf("%s[%u,%llu]", i ? "," : "", closes.all[i].number, (unsigned long long)closes.all[i].at);
    printf("]}\n");
}
