# Runs a command in a directory as if it were a machine of its own. Called by `cargo xtask cleanroom`
# through unshare(1), in mount and process namespaces of its own: when this ends, for whatever reason,
# the kernel ends every process in them and takes every mount away. Nothing is left to clean up.
#
#   enter.sh ROOT TOOLCHAIN USER DIRECTORY COMMAND...
# shellcheck shell=bash
set -euo pipefail
root=$1 toolchain=$2 user=$3 directory=$4
shift 4

# A mount point of its own, because mmdebstrap in the room makes / private, which is refused where /
# is none; and pivot_root rather than chroot, because a process in a chroot may make no user
# namespace (unshare(2)), which an ordinary user's mmdebstrap does.
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount --bind "$toolchain" "$root/opt/rust"
mount -o remount,bind,ro "$root/opt/rust"
mount -t tmpfs -o mode=1777 tmpfs "$root/run"
cd "$root"
mkdir -p .host
pivot_root . .host
umount -l /.host
cd "$directory"
if [ "$user" = root ]; then
    exec "$@"
fi
exec setpriv --reuid="$user" --regid="$user" --init-groups -- "$@"
