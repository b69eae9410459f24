#!/bin/sh
# Process 1 of a guest without systemd: what an init mounts and sets, the run, the end.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /dev/pts /dev/shm /dev/mqueue
mount -t devpts -o gid=5,mode=620,ptmxmode=666,nosuid,noexec devpts /dev/pts
mount -t tmpfs -o mode=1777,nosuid,nodev shm /dev/shm
mount -t mqueue -o nosuid,nodev,noexec mqueue /dev/mqueue
mount -t cgroup2 -o nosuid,nodev,noexec,nsdelegate,memory_recursiveprot cgroup2 /sys/fs/cgroup
mount -t debugfs -o nosuid,nodev,noexec debugfs /sys/kernel/debug
mount --make-rshared /
hostname -F /etc/hostname
ip link set lo up
# Their device nodes exist from the boot on where udev or systemd makes them.
modprobe -a loop tun fuse
/bin/sh /payload/guest/run.sh
sync
busybox poweroff -f
