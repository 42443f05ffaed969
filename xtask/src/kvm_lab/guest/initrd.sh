#!/bin/busybox sh
# The lab's machine from its kernel to its root file system: a Debian that nobody writes to, under a
# layer in memory. Its disks are, in this order: that Debian, what was brought along, and a scratch
# disk on which the results go out.
set -e
export PATH=/bin
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
for module in /modules/*; do
    insmod "$module"
done
mkdir -p /lower /over /system
mount -t erofs -o ro /dev/vda /lower
mount -t tmpfs -o size=50% over /over
mkdir /over/upper /over/work
mount -t overlay -o lowerdir=/lower,upperdir=/over/upper,workdir=/over/work system /system
mkdir -p /system/cargo /system/scratch
mount -t erofs -o ro /dev/vdb /system/cargo
mount -t ext4 /dev/vdc /system/scratch
umount /dev
exec switch_root /system /cargo/lab/init.sh
