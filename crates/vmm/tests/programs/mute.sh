#!/bin/bash
# Stands in for a VMM that dies when it is given its first command, instead of answering it.
# (bash: other shells redirect only to descriptors below 10.) The control socket's number is in the arguments: `-chardev socket,id=monitor,fd=N`.
for argument in "$@"; do
    case $argument in
        socket,id=monitor,fd=*) fd=${argument##*fd=} ;;
    esac
done
printf '{"QMP": {}}\r\n' >&"$fd"
read -r _ <&"$fd"
echo 'out of luck' >&2
exit 4
