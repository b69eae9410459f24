#!/bin/busybox sh
# The first program in the guest, in memory: finds the disks and goes on with the root file system's own init.
# Process 1 is systemd where the kernel's command line has the word guest.systemd, else the script first.sh.
set -eu
/bin/busybox --install -s /bin
export PATH=/bin

mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
while read -r module; do
    insmod "/modules/$module"
done < /modules/order

mount -t ext4 /dev/vda /root
mount -t ext4 /dev/vdb /root/payload
mount -t tmpfs -o mode=755,nosuid,nodev run /root/run

mount --move /dev /root/dev
mount --move /proc /root/proc
mount --move /sys /root/sys
if grep -q guest.systemd /root/proc/cmdline; then
    mkdir -p /root/run/systemd/system
    cp /root/payload/guest/guest.service /root/run/systemd/system/
    exec switch_root /root /lib/systemd/systemd
fi
exec switch_root /root /bin/sh /payload/guest/first.sh
