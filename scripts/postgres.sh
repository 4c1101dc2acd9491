#!/usr/bin/env bash
# Runs a command with a throw-away PostgreSQL beside it:  scripts/postgres.sh COMMAND [ARG]...
# The command finds it in CAIRN_TEST_POSTGRES, a URL of an empty database that it may do
# anything to. The server listens on a socket file only, and goes when the command ends.
#
# Where PostgreSQL is missing it is installed, as root on a Debian; elsewhere the command
# runs without CAIRN_TEST_POSTGRES, and says so.
set -euo pipefail

say() { printf 'postgres: %s\n' "$*" >&2; }

programs() {
  local found
  # Debian keeps them off the PATH; elsewhere a link on the PATH may stand for them.
  found=$(find /usr/lib/postgresql/*/bin -name initdb 2>/dev/null | sort -V | tail -n 1)
  [ -n "$found" ] || found=$(command -v initdb) || return 1
  dirname "$(readlink -f "$found")"
}

if ! bin=$(programs) && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  say "installing"
  export DEBIAN_FRONTEND=noninteractive
  { apt-get -qq update && apt-get -qq install --no-install-recommends postgresql; } >/dev/null || true
fi
if ! bin=$(programs); then
  say "not installed: its tests are left out (install PostgreSQL's server to have them)"
  exec "$@"
fi

# The server refuses to run as root.
as_user=()
if [ "$(id -u)" = 0 ]; then
  as_user=(setpriv --reuid=nobody --regid=nogroup --clear-groups --)
fi

home=$(mktemp -d "${TMPDIR:-/tmp}/cairn-postgres-XXXXXX")
if [ "$(id -u)" = 0 ]; then chown nobody:nogroup "$home"; fi
stop() {
  "${as_user[@]}" "$bin/pg_ctl" --silent --pgdata "$home/data" --mode immediate stop >/dev/null 2>&1 || true
  rm -rf "$home"
}
trap stop EXIT

# One user, trusted: nobody else can open the socket's folder.
cd "$home"
"${as_user[@]}" "$bin/initdb" --no-sync --auth trust --username cairn --encoding UTF8 --no-locale \
  --pgdata "$home/data" >"$home/log" 2>&1 || { cat "$home/log" >&2; exit 1; }
"${as_user[@]}" "$bin/pg_ctl" --silent --wait --pgdata "$home/data" --log "$home/server.log" \
  --options "-c listen_addresses= -c unix_socket_directories=$home -c fsync=off" start >&2 \
  || { cat "$home/server.log" >&2; exit 1; }
"${as_user[@]}" "$bin/createdb" --host "$home" --username cairn cairn
cd "$OLDPWD"

CAIRN_TEST_POSTGRES="postgres:///cairn?host=$home&user=cairn" "$@"
