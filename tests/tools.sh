#!/bin/sh
# Installs what the tests need beside Python, where it can; says loudly what is missing where it can't.
# Under CI a missing tool is a failure.
set -u
cd "$(dirname "$0")/.."

missing() {
    printf '\033[1;33mMISSING: %s\033[0m\n' "$1" >&2
    if [ -n "${CI:-}" ]; then exit 1; fi
}

if ! command -v node >/dev/null || ! command -v npm >/dev/null; then
    if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        { apt-get update -qq && apt-get install -qq -y --no-install-recommends nodejs npm; } >/dev/null 2>&1 || true
    fi
fi
if command -v npm >/dev/null; then
    lock=tests/e2e/node/package-lock.json
    stamp=tests/e2e/node/node_modules/.installed
    if [ ! -e "$stamp" ] || [ "$lock" -nt "$stamp" ]; then
        npm ci --prefix tests/e2e/node --no-audit --no-fund --silent && touch "$stamp" ||
            missing "the Node clients could not be installed; their tests are skipped"
    fi
else
    missing "Node 20 or newer; the tests with the Node clients are skipped"
fi

# Debian's package is only unpacked, into .venv: installing it would start a server on port 80 and keep it enabled.
nginx=.venv/nginx
if ! PATH="$PATH:/usr/sbin:$PWD/$nginx/usr/sbin" command -v nginx >/dev/null; then
    if command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null; then
        mkdir -p "$nginx"
        if [ "$(id -u)" = 0 ]; then apt-get update -qq >/dev/null 2>&1 || true; fi
        { (cd "$nginx" && apt-get download nginx) && dpkg-deb -x "$nginx"/nginx_*.deb "$nginx" &&
            "$nginx/usr/sbin/nginx" -v; } >/dev/null 2>&1 || rm -rf "$nginx"
    fi
    if [ ! -x "$nginx/usr/sbin/nginx" ]; then
        missing "nginx; the tests of deploy/nginx.conf are skipped"
    fi
fi

# The newest Redis that the ledger's scripts are tested on, beside the embedded 6.2; with the libraries that it brings.
redis=.venv/redis
if [ ! -x "$redis/redis-server" ]; then
    if command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null; then
        mkdir -p "$redis/packages"
        if [ "$(id -u)" = 0 ]; then apt-get update -qq >/dev/null 2>&1 || true; fi
        for package in redis-server redis-tools libjemalloc2 liblzf1 libatomic1 libssl3; do
            (cd "$redis/packages" && apt-get download "$package") >/dev/null 2>&1 || true
        done
        for package in "$redis"/packages/*.deb; do
            dpkg-deb -x "$package" "$redis" >/dev/null 2>&1 || true
        done
        rm -rf "$redis/packages"
        cat >"$redis/redis-server" <<'END'
#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
for folder in "$here"/usr/lib/*-linux-gnu; do LD_LIBRARY_PATH="$folder:${LD_LIBRARY_PATH:-}"; done
export LD_LIBRARY_PATH
exec "$here/usr/bin/redis-server" "$@"
END
        chmod +x "$redis/redis-server"
        "$redis/redis-server" --version 2>/dev/null | grep -q 'v=[7-9]' || rm -rf "$redis"
    fi
    if [ ! -x "$redis/redis-server" ]; then
        missing "Redis 7; the ledger is tested on one version only"
    fi
fi
