#!/bin/sh
# Runs what the guest was started for. Its output leaves by a virtio port, through a pipe, because a port cannot be opened twice
# and programs do reopen /dev/stdout. The last line is the exit code.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export HOME=/root TERM=dumb LANG=C.UTF-8
set -e
. /payload/guest/prepare.sh
set +e
for program in /payload/bin/*; do
    [ -e "$program" ] && ln -sf "$program" /usr/local/bin/
done
for port in /dev/vport*p1; do
    [ -c "$port" ] || exit 1
done
mkfifo /run/guest-output
sed -u '/funtainer-guest: exit [0-9]*$/q' < /run/guest-output > "$port" &
forward=$!
exec 8> /run/guest-output
echo "funtainer-guest: up $(uname -r)" >&8
/bin/sh /payload/guest/commands.sh < /dev/null >&8 2>&1 8>&-
code=$?
dmesg --level=emerg,alert,crit,err,warn > /dev/ttyS0
echo "funtainer-guest: exit $code" >&8
wait "$forward"
