#!/bin/sh
# Stands in for a VMM that has much to say.
i=0
while [ $i -lt 20000 ]; do
    echo "line $i" >&2
    i=$((i + 1))
done
echo 'the end' >&2
exit 3
