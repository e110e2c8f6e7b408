#!/usr/bin/env bash
# Run one step of a recipe and say in one line what it does and how long it took.
#   step.sh [-q] "what it does" command...
# -q keeps the command's output back and prints it only when the command fails.
quiet=
if [ "$1" = -q ]; then quiet=1; shift; fi
what=$1; shift
SECONDS=0
if [ -n "$quiet" ]; then
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    printf '==> %s ... ' "$what"
    if "$@" >"$log" 2>&1 </dev/null; then
        printf '%d s\n' "$SECONDS"
    else
        code=$?
        printf 'FAILED after %d s\n' "$SECONDS"
        cat "$log"
        exit "$code"
    fi
else
    printf '==> %s\n' "$what"
    if "$@"; then
        printf '==> %s: %d s\n' "$what" "$SECONDS"
    else
        code=$?
        printf '==> %s: FAILED after %d s (exit code %d)\n' "$what" "$SECONDS" "$code"
        exit "$code"
    fi
fi
