// The engine's connections: those that wait for their time, as a heap, and those that may write now.
#pragma once

#include "wire.h"

#define NOWHERE (-1)

struct conn {
    int fd, waiting, ready;  // places among those that wait for a time, and those that may write now
    uint64_t due, period;    // ns
    uint32_t number, sequence, left;
    bool busy, stream, usage, begun, blocked, broken;
    struct buffer in, out;
};

static struct conn **waiting, **ready;  // the first is a heap by `due`
static int waiting_count, ready_count;

static void place(int at, struct conn *c) { waiting[at] = c; c->waiting = at; }

static void sift(int at, struct conn *c) {
    for (int up; at && waiting[up = (at - 1) / 2]->due > c->due; at = up) place(at, waiting[up]);
    for (int down; (down = 2 * at + 1) < waiting_count; at = down) {
        if (down + 1 < waiting_count && waiting[down + 1]->due < waiting[down]->due) down++;
        if (waiting[down]->due >= c->due) break;
        place(at, waiting[down]);
    }
    place(at, c);
}

static void wait_until(struct conn *c, uint64_t due) {
    c->due = due;
    if (c->waiting == NOWHERE) c->waiting = waiting_count++;
    sift(c->waiting, c);
}

static void wait_no_more(struct conn *c) {
    int at = c->waiting;
    if (at == NOWHERE) return;
    c->waiting = NOWHERE;
    struct conn *last = waiting[--waiting_count];
    if (last != c) sift(at, last);
}

static void set_ready(struct conn *c, bool is) {
    if (is == (c->ready != NOWHERE)) return;
    if (is) {
        ready[c->ready = ready_count++] = c;
    } else {
        struct conn *last = ready[--ready_count];
        ready[last->ready = c->ready] = last;
        c->ready = NOWHERE;
    }
}
