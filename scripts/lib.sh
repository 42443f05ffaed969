# Shared by `try`, `test` and `host-packages`. Sourced, never run.
# shellcheck shell=bash

say() { printf '%s\n' "$*"; }

die() {
    printf 'error: %s\n' "$1" >&2
    shift
    local hint
    for hint in "$@"; do
        printf 'hint: %s\n' "$hint" >&2
    done
    exit 1
}

# Microseconds since 1970, whatever the locale's decimal point is.
now_us() { printf '%s' "${EPOCHREALTIME//[!0-9]/}"; }

# "12.3" from two results of now_us.
seconds_between() {
    local tenths=$((($2 - $1) / 100000))
    printf '%d.%d' $((tenths / 10)) $((tenths % 10))
}

# Ordinary users' PATH lacks the administrator's programs, and a shell that was not logged in may
# lack cargo.
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
if ! command -v cargo >/dev/null 2>&1 && [ -n "${HOME:-}" ] && [ -x "$HOME/.cargo/bin/cargo" ]; then
    PATH="$HOME/.cargo/bin:$PATH"
fi
export PATH

need_cargo() {
    command -v cargo >/dev/null 2>&1 || die "the Rust toolchain is not installed, or cargo is not in PATH" \
        "https://www.rust-lang.org/tools/install tells how to install it"
}
