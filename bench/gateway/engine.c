// A synthetic engine in vLLM's wire format: one thread, no tokenizer, no model, and a clock in every token.
//
//     engine [--port 0] [--rate 132] [--prefill-us 0] [--delay-us 0]
//
// rate: tokens per second of each stream, in a phase of its own after the first; 0: as fast as its socket takes them.
// delay: before an answer that is no stream. A prompt overrides them with bench-rate-N, bench-prefill-N, bench-delay-N.
// It prints its port. GET /stats tells what it has seen, also which requests were given up by their client, and when.
#define _GNU_SOURCE
#include <netinet/tcp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include "queue.h"
#include "says.h"
#include "wire.h"

#define BURST 4  // tokens that a stream without a pace writes before the next one's turn

static uint64_t rate, prefill_us, delay_us, random_state = 88172645463325252u;

// ---- requests

static uint64_t asked(const char *body, const char *mark, uint64_t otherwise) {
    long long found = number_after(body, mark);
    return found < 0 ? otherwise : (uint64_t)found;
}

static uint64_t phase(uint64_t period) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return period ? random_state % period : 0;
}

static void generate(struct conn *c, const char *head, const char *body) {
    uint64_t now = now_ns(), pace = asked(body, "bench-rate-", rate);
    size_t length;
    time_t clock = time(NULL);
    struct tm parts;
    strftime(date, sizeof date, "%a, %d %b %Y %H:%M:%S GMT", gmtime_r(&clock, &parts));
    snprintf(created, sizeof created, "%010lld", (long long)clock);
    requests++;
    c->busy = true, c->begun = false, c->sequence = 0;
    c->number = (uint32_t)asked(body, REQUEST_MARK, 0) & NUMBERS;
    c->left = (uint32_t)asked(body, "\"max_completion_tokens\":", asked(body, "\"max_tokens\":", 16));
    c->stream = strstr(body, "\"stream\":true") || strstr(body, "\"stream\": true");
    c->usage = strstr(body, "\"include_usage\":true") || strstr(body, "\"include_usage\": true");
    c->period = pace ? 1000000000u / pace : 0;
    if (!c->stream) {
        wait_until(c, now + 1000 * asked(body, "bench-delay-", delay_us));
        return;
    }
    const char *id = header(head, "\r\nx-request-id:", &length);
    char answer[600];
    int n = snprintf(answer, sizeof answer, "HTTP/1.1 200 OK\r\ndate: %s\r\nserver: uvicorn\r\n%s%.*s%s"
        "content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n", date,
        id ? "x-request-id: " : "", id && length < 200 ? (int)length : 0, id ? id : "", id ? "\r\n" : "");
    say(c, answer, (size_t)n);
    wait_until(c, now + 1000 * asked(body, "bench-prefill-", prefill_us));
}

static void answer(struct conn *c, const char *head, const char *body) {
    if (!strncmp(head, "POST /v1/chat/completions ", 26)) generate(c, head, body);
    else if (!strncmp(head, "GET /health ", 12)) say_whole(c, 200, "");
    else if (!strncmp(head, "GET /stats ", 11)) say_stats(c);
    else if (!strncmp(head, "GET /v1/models ", 15))
        say_whole(c, 200, "{\"object\":\"list\",\"data\":[{\"id\":\"" MODEL "\",\"object\":\"model\",\"created\":0,"
            "\"owned_by\":\"vllm\",\"root\":\"" MODEL "\",\"parent\":null,\"max_model_len\":262144}]}");
    else say_whole(c, 404, "{\"detail\":\"Not Found\"}");
}

// Answers one request if a whole one is there.
static bool take(struct conn *c) {
    size_t there = c->in.len - c->in.at, length = 0, digits;
    char *head = c->in.data + c->in.at, *end = there ? memmem(head, there, "\r\n\r\n", 4) : NULL;
    if (!end) return false;
    char cut = end[3];
    end[3] = 0;
    const char *found = header(head, "\r\ncontent-length:", &digits);
    if (found) length = strtoul(found, NULL, 10);
    if (there < (size_t)(end + 4 - head) + length) { end[3] = cut; return false; }
    char *body = end + 4, after = body[length];
    body[length] = 0;  // there is room: receive() keeps a byte
    c->in.at += (size_t)(body - head) + length;
    answer(c, head, body);
    body[length] = after;
    return true;
}

static void receive(struct conn *c) {
    for (;;) {
        buffer_need(&c->in, 16385);
        ssize_t n = recv(c->fd, c->in.data + c->in.len, 16384, 0);
        if (n <= 0) { c->broken = n == 0 || errno != EAGAIN; break; }
        c->in.len += (size_t)n;
        if (n < 16384) break;
    }
    while (!c->broken && !c->busy && take(c)) {}
}

// ---- connections

static void end(struct conn *c, uint64_t now) {
    if (c->busy) events_add(&aborts, c->number, now);
    wait_no_more(c);
    set_ready(c, false);
    close(c->fd);
    free(c->in.data);
    free(c->out.data);
    free(c);
    open_connections--;
}

// What a connection has to say at its time, or whenever it can.
static void go(struct conn *c) {
    if (!c->stream) { wait_no_more(c); say_completion(c); }
    else {
        if (!c->begun) say_opening(c);
        for (int n = 0; c->left && n < (c->period ? 1 : BURST) && (c->period || !c->blocked); n++) say_token(c);
        if (!c->left && (c->period || !c->blocked)) say_end(c);
        if (c->busy && c->period) wait_until(c, c->due + (c->sequence == 1 ? phase(c->period) : c->period));
        else wait_no_more(c);
        set_ready(c, c->busy && !c->period && !c->blocked);
    }
    while (!c->broken && !c->busy && take(c)) {}
}

static void welcome(int listener) {
    int fd, one = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct conn *c = calloc(1, sizeof *c);
        if (!c) die("memory");
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        c->fd = fd, c->waiting = c->ready = NOWHERE;
        watch(c, EPOLL_CTL_ADD);
        open_connections++;
    }
}

static void happened(struct conn *c, uint32_t events) {
    uint64_t now = now_ns();
    if (events & EPOLLIN) receive(c);
    if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) c->broken = true;
    if (!c->broken && events & EPOLLOUT) {
        flush(c);
        if (!c->blocked && c->busy && c->begun && !c->period) set_ready(c, true);
    }
    if (c->broken) end(c, now);
}

static int listening(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), one = 1;
    struct sockaddr_in at = loopback(port);
    socklen_t size = sizeof at;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 4096)) die("listen");
    if (getsockname(fd, (struct sockaddr *)&at, &size)) die("listen");
    printf("%d\n", ntohs(at.sin_port));
    fflush(stdout);
    return fd;
}

int main(int count, char **arguments) {
    struct rlimit files;
    struct epoll_event events[256];
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    prctl(PR_SET_TIMERSLACK, 1);
    rate = strtoull(argument(count, arguments, "--rate", "132"), NULL, 10);
    prefill_us = strtoull(argument(count, arguments, "--prefill-us", "0"), NULL, 10);
    delay_us = strtoull(argument(count, arguments, "--delay-us", "0"), NULL, 10);
    waiting = calloc(65536, sizeof *waiting), ready = calloc(65536, sizeof *ready);
    make_token_chunk();
    if ((poller = epoll_create1(EPOLL_CLOEXEC)) < 0 || !waiting || !ready) die("start");
    int listener = listening(atoi(argument(count, arguments, "--port", "0")));
    struct epoll_event listen_event = {.events = EPOLLIN};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, listener, &listen_event)) die("epoll_ctl");
    for (;;) {
        uint64_t now = now_ns(), left = 0;
        if (!ready_count && waiting_count && waiting[0]->due > now) left = waiting[0]->due - now;
        struct timespec most = {.tv_sec = (time_t)(left / 1000000000u), .tv_nsec = (long)(left % 1000000000u)};
        int n = epoll_pwait2(poller, events, 256, ready_count || waiting_count ? &most : NULL, NULL);
        for (int i = 0; i < n; i++)
            if (events[i].data.ptr) happened(events[i].data.ptr, events[i].events);
            else welcome(listener);
        for (now = now_ns(); waiting_count && waiting[0]->due <= now;) {
            struct conn *c = waiting[0];
            go(c);
            if (c->broken) end(c, now);
        }
        for (int i = ready_count; i--;) {
            struct conn *c = ready[i];
            go(c);
            if (c->broken) end(c, now_ns());
        }
    }
}
