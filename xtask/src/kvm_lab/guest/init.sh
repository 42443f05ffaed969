#!/bin/bash
# The lab's first process: makes an ordinary machine of it, runs the job, and switches it off. The
# kernel speaks on the first serial port, the job on the second, its exit code goes to the third, and a sign of
# life to the fourth.
export PATH=/cargo/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root USER=root LANG=C.UTF-8 TERM=${TERM:-linux} TMPDIR=/scratch/tmp

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts -o mode=620,ptmxmode=666,gid=5 pts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t tmpfs -o mode=755 run /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ln -sfn /proc/self/fd /dev/fd
ln -sfn fd/0 /dev/stdin
ln -sfn fd/1 /dev/stdout
ln -sfn fd/2 /dev/stderr
hostname kvm-lab
printf '127.0.0.1 localhost kvm-lab\n' >/etc/hosts
ip link set lo up

mkdir -p -m 1777 /scratch/tmp
mkdir -p -m 755 /scratch/out
mkdir -p -m 1777 /scratch/out/cores
echo '/scratch/out/cores/%e.%p' >/proc/sys/kernel/core_pattern
ulimit -c unlimited
for module in tun vhost_vsock; do
    modprobe "$module"
done
stty -F /dev/ttyS1 raw
stty -F /dev/ttyS2 raw
stty -F /dev/ttyS3 raw
while sleep 5; do echo; done >/dev/ttyS3 2>/dev/null &

cd /scratch || exit
if [ -e /cargo/lab/shell ]; then
    modprobe kvm-amd
    echo "The KVM lab. What was brought along is in /cargo; what is in /scratch/out goes out. \`exit\` ends it."
    setsid --ctty bash --login -i </dev/ttyS0 >/dev/ttyS0 2>&1
    code=0
else
    /cargo/lab/job.sh </dev/null >/dev/ttyS1 2>&1
    code=$?
fi
cd /
dmesg >/scratch/out/dmesg.txt
rmdir --ignore-fail-on-non-empty /scratch/out/cores
sync
echo "$code" >/dev/ttyS2
umount /scratch || mount -o remount,ro /scratch || sync
busybox poweroff -f
