// A load generator that believes nobody: every token must be the next one of its stream, and tells how long it took.
//
//     load MODE --port PORT --request FILE [--connections 1] [--seconds S | --rounds R | --tokens T] [--expect N]
//
// MODE  stream     streams, one after the other on each connection
//       short      answers that are no stream
//       short-new  the same, with a TCP connection for each
//       abort      hangs up after --after-tokens K, or --after-ms T
// FILE holds a whole HTTP request; the digits after "bench-request-" in it become the request's number, --first and on.
// Connection i begins after i/connections of --spread-ms. After --seconds, --rounds of each connection, or --tokens in
// all, what runs may end; if nothing comes for --patience-ms it is given up. --expect: tokens of each stream.
// Prints one JSON object. "first" is the time from the request's write (short-new: its connect) to the first token, or
// to the end of an answer that is no stream; all times are in ns.
#define _GNU_SOURCE
#include <sys/prctl.h>

#include "client.h"
#include "tally.h"
#include "wire.h"

#define READ_BYTES 262144

// ---- answers

static void token(struct conn *c, const char *text, uint64_t now) {
    uint64_t number = get_hex(text, NUMBER_DIGITS), sequence = get_hex(text + SEQUENCE_AT, NUMBER_DIGITS);
    uint64_t written = get_hex(text + CLOCK_AT, CLOCK_DIGITS);
    if (number != c->number || sequence == UINT64_MAX || written > now) { foreign++; return; }
    count_place(&c->order, (uint32_t)sequence);
    tokens++;
    slice_at(now)->tokens++;
    count_time(TRANSIT, now, now - written);
    if (!c->first_seen) {
        c->first_seen = true;
        count_time(FIRST, now, now - c->started);
        count_time(FIRST_TRANSIT, now, now - written);
    }
    if (aborting && after_tokens && c->order.expected >= after_tokens) abort_now(c);
}

static void line(struct conn *c, const char *text, size_t n, uint64_t now) {
    if (n && text[n - 1] == '\r') n--;
    if (n < 6 || memcmp(text, "data: ", 6)) return;  // comments and empty lines
    if (n == 12 && !memcmp(text + 6, "[DONE]", 6)) { c->done = true; return; }
    if (n > 14 && !memcmp(text + 6, "{\"error\"", 8)) { error(text, n, c->status); return; }
    const char *found = memmem(text, n, "\"content\":\"", 11);
    if (found && (size_t)(text + n - found) > 11 + TOKEN_LENGTH && found[11] != '"') token(c, found + 11, now);
}

static void body(struct conn *c, const char *bytes, size_t n, uint64_t now) {
    if (!streams || c->status != 200) { if (c->line.len < 1000) buffer_add(&c->line, bytes, n); return; }
    while (n && c->fd >= 0) {
        const char *end = memchr(bytes, '\n', n);
        size_t length = end ? (size_t)(end - bytes) : n;
        if (!end || c->line.len) buffer_add(&c->line, bytes, length);
        if (!end) return;
        if (c->line.len) line(c, c->line.data, c->line.len, now), buffer_clear(&c->line);
        else line(c, bytes, length, now);
        bytes += length + 1, n -= length + 1;
    }
}

static void complete(struct conn *c, uint64_t now) {
    if (c->status != 200) {
        error(c->line.data ? c->line.data : "", c->line.len, c->status);
    } else if (streams && !c->done) {
        error("a stream ended without [DONE]", 29, 200);
    } else {
        answers++;
        if (streams && expect > c->order.expected) lost += expect - c->order.expected;
        if (!streams) count_time(FIRST, now, now - c->started);
    }
    if (!c->keep) hang_up(c);
    then(c, now, c->status == 200 ? 0 : 20000000);
}

static void read_head(struct conn *c) {
    size_t digits = 0;
    const char *head = c->head.data, *encoding = header(head, "\r\ntransfer-encoding:", &digits);
    c->status = c->head.len > 12 ? atoi(head + 9) : 0;
    c->chunked = encoding && !strncasecmp(encoding, "chunked", 7);
    const char *length = header(head, "\r\ncontent-length:", &digits);
    const char *connection = header(head, "\r\nconnection:", &digits);
    c->keep = !(connection && !strncasecmp(connection, "close", 5)) && (c->chunked || length);
    c->left = length ? strtoul(length, NULL, 10) : SIZE_MAX;
    c->state = c->chunked ? SIZE : BODY;
    buffer_clear(&c->head);
}

// Bytes of a head or of a chunk's frame, up to `mark`; how many are used. The text is whole when c->head ends with it.
static size_t gather(struct conn *c, const char *bytes, size_t n, char mark) {
    const char *end = memchr(bytes, mark, n);
    size_t used = end ? (size_t)(end - bytes) + 1 : n;
    buffer_add(&c->head, bytes, used);
    buffer_add(&c->head, "", 1);  // so that it reads as a string
    c->head.len--;
    return used;
}

static bool ends_with(const struct buffer *b, const char *end) {
    size_t n = strlen(end);
    return b->len >= n && !memcmp(b->data + b->len - n, end, n);
}

static void feed(struct conn *c, const char *bytes, size_t n, uint64_t now) {
    while (n && c->busy && c->fd >= 0) {
        size_t used = n;
        if (c->state == BODY || c->state == DATA) {
            if (used > c->left) used = c->left;
            c->left -= used;
            body(c, bytes, used, now);
            if (c->fd < 0) return;
            if (!c->left && c->state == DATA) c->state = DATA_END;
        } else {
            used = gather(c, bytes, n, '\n');
            if (c->state == HEAD && ends_with(&c->head, "\r\n\r\n")) read_head(c);
            else if (c->state == DATA_END && ends_with(&c->head, "\n")) c->state = SIZE, buffer_clear(&c->head);
            else if (c->state == SIZE && ends_with(&c->head, "\n")) {
                c->left = strtoul(c->head.data, NULL, 16);
                c->state = c->left ? DATA : TRAILER;
                buffer_clear(&c->head);
            } else if (c->state == TRAILER && ends_with(&c->head, "\n")) {
                bool empty = c->head.len <= 2;
                buffer_clear(&c->head);
                if (empty) { complete(c, now); return; }
            }
        }
        if (c->state == BODY && !c->left) { complete(c, now); return; }
        bytes += used, n -= used;
    }
}

static void happened(struct conn *c, uint32_t events) {
    static char bytes[READ_BYTES];
    if (c->connecting && events & EPOLLOUT) { connected(c); return; }
    if (c->fd < 0) return;
    ssize_t n = recv(c->fd, bytes, READ_BYTES, 0);
    uint64_t now = now_ns();
    if (n > 0) {
        last_progress = now;
        feed(c, bytes, (size_t)n, now);
    } else if (n == 0 || errno != EAGAIN) {
        if (!c->busy) hang_up(c);  // it was idle: a new connection next time
        else if (c->state == BODY && c->left > SIZE_MAX / 2) c->keep = false, complete(c, now);
        else fail(c, n ? strerror(errno) : "the connection was closed in the middle of an answer", now);
    }
}

// ---- the run

static void run_due(struct conn *all, uint64_t now) {
    next_due = NEVER;
    for (int i = 0; i < connection_count; i++) {
        struct conn *c = &all[i];
        if (c->hang_up_at <= now) abort_now(c);
        else if (!c->busy && c->due <= now) { if (more(c, now)) begin(c, now); else finish(c); }
        uint64_t next = c->busy ? c->hang_up_at : c->due;
        if (next < next_due) next_due = next;
    }
}

static void run(struct conn *all, bool tell) {
    struct epoll_event events[256];
    uint64_t told = now_ns();
    while (over_count < connection_count) {
        uint64_t now = now_ns();
        if (next_due <= now) run_due(all, now);
        uint64_t wake = next_due < now + 100000000 ? next_due : now + 100000000, left = wake > now ? wake - now : 0;
        struct timespec most = {.tv_nsec = (long)left};
        int n = epoll_pwait2(poller, events, 256, &most, NULL);
        for (int i = 0; i < n; i++) happened(events[i].data.ptr, events[i].events);
        now = now_ns();
        if (now - last_progress > patience_ns && now > began + patience_ns) {
            for (int i = 0; i < connection_count; i++)
                if (all[i].busy) error("nothing came any more", 21, all[i].status), finish(&all[i]);
                else if (!all[i].over) finish(&all[i]);
        }
        if (tell && now - told > 10000000000u) {
            told = now;
            fprintf(stderr, "%.0f million tokens after %.0f s\n", (double)tokens / 1e6, (double)(now - began) / 1e9);
        }
    }
}

static void load_request(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) die(path);
    for (int byte; (byte = getc(file)) != EOF;) buffer_add(&request, &(char){(char)byte}, 1);
    fclose(file);
    char *mark = memmem(request.data, request.len, REQUEST_MARK, strlen(REQUEST_MARK));
    if (!mark) { fprintf(stderr, "the request has no number\n"); exit(2); }
    number_at = (size_t)(mark - request.data) + strlen(REQUEST_MARK);
}

int main(int count, char **arguments) {
    const char *mode = count > 1 ? arguments[1] : "";
#define NUMBER(name, otherwise) strtoull(argument(count, arguments, name, otherwise), NULL, 10)
    aborting = !strcmp(mode, "abort"), new_each = !strcmp(mode, "short-new");
    after_tokens = NUMBER("--after-tokens", "0"), after_ns = NUMBER("--after-ms", "0") * 1000000;
    streams = !strcmp(mode, "stream") || (aborting && after_tokens);
    port = (int)NUMBER("--port", "0"), connection_count = (int)NUMBER("--connections", "1");
    round_limit = NUMBER("--rounds", "0"), token_limit = NUMBER("--tokens", "0"), expect = NUMBER("--expect", "0");
    slice_ns = NUMBER("--slice-ms", "100") * 1000000, patience_ns = NUMBER("--patience-ms", "15000") * 1000000;
    next_number = NUMBER("--first", "1");
    uint64_t spread = NUMBER("--spread-ms", "0") * 1000000;
    load_request(argument(count, arguments, "--request", ""));
    prctl(PR_SET_TIMERSLACK, 1);
    struct conn *all = calloc((size_t)connection_count, sizeof *all);
    if ((poller = epoll_create1(EPOLL_CLOEXEC)) < 0 || !all) die("start");
    began = last_progress = now_ns();
    ends = began + (uint64_t)(strtod(argument(count, arguments, "--seconds", "1"), NULL) * 1e9);
    for (int i = 0; i < connection_count; i++) {
        all[i].fd = -1, all[i].hang_up_at = NEVER;
        due(&all[i], began + spread * (uint64_t)i / (uint64_t)connection_count);
    }
    run(all, token_limit > 0);
    report(mode);
}
