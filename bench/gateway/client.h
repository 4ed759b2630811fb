// The load generator's connections: begun, given up, and what comes after each request.
#pragma once

#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tally.h"
#include "wire.h"

#define NEVER UINT64_MAX

enum state { HEAD, BODY, SIZE, DATA, DATA_END, TRAILER };

struct conn {
    int fd;
    enum state state;
    bool over, busy, connecting, chunked, keep, done, first_seen;
    int status;
    uint64_t started, due, hang_up_at;  // ns; NEVER: not at all
    uint32_t number, rounds;
    struct order order;
    size_t left;
    struct buffer head, line;
};

static bool streams, new_each, aborting;
static int poller, port, connection_count, over_count;
static uint64_t ends, token_limit, round_limit, expect, after_tokens, after_ns, patience_ns, next_due = NEVER;
static uint64_t last_progress, next_number;
static struct buffer request;
static size_t number_at;

static void due(struct conn *c, uint64_t at) {
    c->due = at;
    if (at < next_due) next_due = at;
}

static void hang_up(struct conn *c) {
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
    c->busy = c->connecting = false;
    c->hang_up_at = NEVER;
}

static void finish(struct conn *c) {
    hang_up(c);
    c->over = true;
    c->due = NEVER;
    over_count++;
}

static bool more(const struct conn *c, uint64_t now) {
    if (token_limit) return tokens < token_limit;
    return round_limit ? c->rounds < round_limit : now < ends;
}

static void then(struct conn *c, uint64_t now, uint64_t pause_ns) {
    if (new_each) hang_up(c);
    c->busy = false;
    if (more(c, now)) due(c, now + pause_ns);
    else finish(c);
}

static void fail(struct conn *c, const char *what, uint64_t now) {
    error(what, strlen(what), c->status);
    hang_up(c);
    then(c, now, 20000000);
}

static void abort_now(struct conn *c) {
    uint64_t now = now_ns();
    events_add(&closes, c->number, now);
    hang_up(c);
    then(c, now, 20000000);
}

static void send_request(struct conn *c) {
    char digits[12];
    c->number = (uint32_t)(next_number++ % NUMBERS);
    snprintf(digits, sizeof digits, "%010u", c->number);
    memcpy(request.data + number_at, digits, 10);
    if (!new_each) c->started = now_ns();
    if (send(c->fd, request.data, request.len, MSG_NOSIGNAL) != (ssize_t)request.len) {
        fail(c, "the request could not be written", now_ns());
        return;
    }
    if (after_ns) c->hang_up_at = c->started + after_ns, due(c, c->hang_up_at);
}

static void begin(struct conn *c, uint64_t now) {
    c->busy = true, c->state = HEAD, c->status = 0, c->done = c->first_seen = false;
    c->order.expected = 0, c->order.missing_count = 0, c->started = now, c->hang_up_at = c->due = NEVER;
    c->rounds++;
    requests++;
    buffer_clear(&c->head);
    buffer_clear(&c->line);
    if (c->fd >= 0) { send_request(c); return; }
    int one = 1;
    struct sockaddr_in at = loopback(port);
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) die("socket");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    connects++;
    c->connecting = true;
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT, .data.ptr = c};
    if (connect(c->fd, (struct sockaddr *)&at, sizeof at) && errno != EINPROGRESS) {
        fail(c, strerror(errno), now);
        return;
    }
    if (epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &event)) die("epoll_ctl");
}

static void connected(struct conn *c) {
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    if (epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &event)) die("epoll_ctl");
    c->connecting = false;
    send_request(c);
}

