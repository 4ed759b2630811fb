// What the engine says, as vLLM and uvicorn write it: every event is a chunk, and every chunk is written by itself.
#pragma once

#include <sys/epoll.h>
#include <sys/socket.h>

#include "queue.h"
#include "wire.h"

#define MODEL "velocity-30b"

static int poller;
static uint64_t requests, tokens, open_connections;
static struct events aborts;  // requests whose client left
static char token_chunk[512], date[64], created[16];
static size_t token_chunk_length, id_at, created_at, text_at;

static void watch(struct conn *c, int how) {
    struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP | (c->blocked ? EPOLLOUT : 0), .data.ptr = c};
    if (epoll_ctl(poller, how, c->fd, &event)) die("epoll_ctl");
}

static void flush(struct conn *c) {
    while (c->out.at < c->out.len) {
        ssize_t n = send(c->fd, c->out.data + c->out.at, c->out.len - c->out.at, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno != EAGAIN) c->broken = true;
            else if (!c->blocked) { c->blocked = true; watch(c, EPOLL_CTL_MOD); }
            return;
        }
        c->out.at += (size_t)n;
    }
    buffer_clear(&c->out);
    if (c->blocked) { c->blocked = false; watch(c, EPOLL_CTL_MOD); }
}

static void say(struct conn *c, const char *bytes, size_t n) {
    buffer_add(&c->out, bytes, n);
    if (!c->blocked) flush(c);
}

static void say_event(struct conn *c, const char *event) {
    char chunk[700];
    int n = snprintf(chunk, sizeof chunk, "%zx\r\n%s\r\n", strlen(event), event);
    say(c, chunk, (size_t)n);
}

#define OPENING \
    "data: {\"id\":\"chatcmpl-%016x\",\"object\":\"chat.completion.chunk\",\"created\":%s,\"model\":\"" MODEL "\","

static void make_token_chunk(void) {
    char event[400];
    int n = snprintf(event, sizeof event, OPENING "\"choices\":[{\"index\":0,\"delta\":{\"content\":\"" TOKEN_SHAPE
        "\"},\"logprobs\":null,\"finish_reason\":null,\"token_ids\":null}]}\n\n", 0, "0000000000", 0, 0, 0ull);
    token_chunk_length = (size_t)snprintf(token_chunk, sizeof token_chunk, "%x\r\n%s\r\n", n, event);
    id_at = (size_t)(strstr(token_chunk, "chatcmpl-") - token_chunk) + strlen("chatcmpl-");
    created_at = (size_t)(strstr(token_chunk, "\"created\":") - token_chunk) + strlen("\"created\":");
    text_at = (size_t)(strstr(token_chunk, "content\":\"") - token_chunk) + strlen("content\":\"");
}

static void say_token(struct conn *c) {
    put_hex(token_chunk + id_at, c->number, 16);
    memcpy(token_chunk + created_at, created, 10);
    put_hex(token_chunk + text_at, c->number, NUMBER_DIGITS);
    put_hex(token_chunk + text_at + SEQUENCE_AT, c->sequence++, NUMBER_DIGITS);
    put_hex(token_chunk + text_at + CLOCK_AT, now_ns(), CLOCK_DIGITS);
    say(c, token_chunk, token_chunk_length);
    c->left--;
    tokens++;
}

static void say_opening(struct conn *c) {
    char event[600];
    snprintf(event, sizeof event, OPENING
        "\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},"
        "\"logprobs\":null,\"finish_reason\":null}],\"prompt_token_ids\":null}\n\n", c->number, created);
    say_event(c, event);
    c->begun = true;
}

static void say_end(struct conn *c) {
    char event[600];
    snprintf(event, sizeof event, OPENING "\"choices\":[{\"index\":0,\"delta\":{\"content\":\"\"},\"logprobs\":null,"
        "\"finish_reason\":\"length\",\"stop_reason\":null,\"token_ids\":null}]}\n\n", c->number, created);
    say_event(c, event);
    if (c->usage) {
        snprintf(event, sizeof event, OPENING "\"choices\":[],\"usage\":{\"prompt_tokens\":16,\"total_tokens\":%u,"
            "\"completion_tokens\":%u}}\n\n", c->number, created, c->sequence + 16, c->sequence);
        say_event(c, event);
    }
    say_event(c, "data: [DONE]\n\n");
    say(c, "0\r\n\r\n", 5);
    c->busy = false;
}

static void say_whole(struct conn *c, int status, const char *body) {
    char head[300];
    int n = snprintf(head, sizeof head, "HTTP/1.1 %s\r\ndate: %s\r\nserver: uvicorn\r\ncontent-length: %zu\r\n"
        "content-type: application/json\r\n\r\n", status == 200 ? "200 OK" : "404 Not Found", date, strlen(body));
    buffer_add(&c->out, head, (size_t)n);
    say(c, body, strlen(body));
    c->busy = false;
}

static void say_completion(struct conn *c) {
    char body[700];
    snprintf(body, sizeof body,
        "{\"id\":\"chatcmpl-%016x\",\"object\":\"chat.completion\",\"created\":%s,"
        "\"model\":\"" MODEL "\","
        "\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\","
        "\"content\":\"A button is a box that can be pressed.\","
        "\"refusal\":null,\"tool_calls\":[],\"reasoning\":null},\"logprobs\":null,\"finish_reason\":\"length\"}],"
        "\"usage\":{\"prompt_tokens\":16,\"total_tokens\":%u,\"completion_tokens\":%u},\"prompt_logprobs\":null}",
        c->number, created, c->left + 16, c->left);
    say_whole(c, 200, body);
}

static void say_stats(struct conn *c) {
    size_t room = 200 + 40 * aborts.count;
    char *body = malloc(room);
    if (!body) die("memory");
    int n = sprintf(body, "{\"requests\":%llu,\"tokens\":%llu,\"open\":%llu,\"aborts\":[", (unsigned long long)requests,
        (unsigned long long)tokens, (unsigned long long)open_connections);
    for (size_t i = 0; i < aborts.count; i++)
        n += sprintf(body + n, "%s[%u,%llu]", i ? "," : "", aborts.all[i].number, (unsigned long long)aborts.all[i].at);
    strcpy(body + n, "]}");
    say_whole(c, 200, body);
    free(body);
}
