// What both programs share: the clock, buffers that grow, the token's text, and numbers found by their bytes.
#pragma once

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

// A token's text: its request's number, its place in the stream, and the engine's clock (ns) when it was written.
#define TOKEN_SHAPE "%06x.%06x.%014llx"
#define TOKEN_LENGTH 28
#define NUMBER_DIGITS 6
#define SEQUENCE_AT 7
#define CLOCK_AT 14
#define CLOCK_DIGITS 14
#define NUMBERS 0xffffff  // a request's number is taken modulo this

#define REQUEST_MARK "bench-request-"  // in the prompt, before the request's number

static inline uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline void die(const char *what) {
    perror(what);
    exit(2);
}

// Bytes at data[at] to data[len] are there and not used yet.
struct buffer {
    char *data;
    size_t at, len, room;
};

static inline void buffer_clear(struct buffer *b) { b->at = b->len = 0; }

static inline void buffer_need(struct buffer *b, size_t more) {
    if (b->at && b->at == b->len) buffer_clear(b);
    if (b->len + more <= b->room) return;
    b->room = (b->len + more) * 2;
    if (!(b->data = realloc(b->data, b->room))) die("memory");
}

static inline void buffer_add(struct buffer *b, const void *bytes, size_t n) {
    buffer_need(b, n);
    memcpy(b->data + b->len, bytes, n);
    b->len += n;
}

// What happened to requests, and when (ns).
struct events {
    struct event { uint32_t number; uint64_t at; } *all;
    size_t count;
};

static inline void events_add(struct events *events, uint32_t number, uint64_t at) {
    size_t n = events->count++;
    if (!(n & (n + 1)) && !(events->all = realloc(events->all, 2 * (n + 1) * sizeof *events->all))) die("memory");
    events->all[n] = (struct event){number, at};
}

static inline struct sockaddr_in loopback(int port) {
    struct in_addr here = {.s_addr = htonl(INADDR_LOOPBACK)};
    return (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr = here};
}

static inline void put_hex(char *to, uint64_t value, int digits) {
    while (digits--) {
        to[digits] = "0123456789abcdef"[value & 15];
        value >>= 4;
    }
}

// UINT64_MAX if there is anything but digits.
static inline uint64_t get_hex(const char *from, int digits) {
    uint64_t value = 0;
    for (; digits--; from++) {
        int digit = *from >= '0' && *from <= '9' ? *from - '0' : *from >= 'a' && *from <= 'f' ? *from - 'a' + 10 : -1;
        if (digit < 0) return UINT64_MAX;
        value = value << 4 | (uint64_t)digit;
    }
    return value;
}

// The whole number that follows a mark; -1 if there is none. The text has a 0 byte at its end.
static inline long long number_after(const char *text, const char *mark) {
    for (const char *found = text; (found = strstr(found, mark));) {
        found += strlen(mark);
        while (*found == ' ') found++;
        if (*found >= '0' && *found <= '9') return strtoll(found, NULL, 10);
    }
    return -1;
}

// The value of a header, up to its line's end; NULL if there is none. `name` is "\r\nname:"; the head ends with 0.
static inline const char *header(const char *head, const char *name, size_t *length) {
    const char *found = strcasestr(head, name);
    if (!found) return NULL;
    found += strlen(name);
    while (*found == ' ') found++;
    *length = strcspn(found, "\r");
    return found;
}

// The value of --name among the arguments.
static inline const char *argument(int count, char **arguments, const char *name, const char *otherwise) {
    for (int i = 1; i + 1 < count; i++)
        if (!strcmp(arguments[i], name)) return arguments[i + 1];
    return otherwise;
}
