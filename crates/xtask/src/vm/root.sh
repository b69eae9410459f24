#!/bin/sh
# Completes the guest's root file system: mmdebstrap(1) runs this with its directory as the only argument.
# The kernel is downloaded by apt and unpacked: nothing of its package's own installation (an initramfs, a boot loader) is needed here.
set -eu
root=$1
export PATH=/usr/sbin:/usr/bin:/sbin:/bin

name=$(APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-cache depends --important linux-image-cloud-amd64 |
    sed -n 's/^ *Depends: *\(linux-image-[0-9].*\)$/\1/p' | head -n 1)
case "$name" in
    linux-image-6.1.*-cloud-amd64) ;;
    *)
        echo "Debian 12's kernel is linux-image-6.1.*-cloud-amd64, and apt names '$name'" >&2
        exit 1
        ;;
esac
mkdir "$root/kernel"
(cd "$root/kernel" && APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get download --quiet --quiet -o APT::Sandbox::User=root "$name")
# /lib is a link, and stays one.
dpkg-deb --fsys-tarfile "$root/kernel/$name"_*.deb | tar --extract --keep-directory-symlink --directory "$root"
rm -r "$root/kernel"
chroot "$root" depmod "${name#linux-image-}"

# Kernel and modules come from one package, so the boot uses these files.
printf '%s\n' "${name#linux-image-}" > "$root/boot/release"

# Users as a machine has them.
chroot "$root" useradd --create-home --shell /bin/bash --uid 1000 user
echo guest > "$root/etc/hostname"
printf '127.0.0.1 localhost guest\n::1 localhost ip6-localhost\n' > "$root/etc/hosts"
# Without a network there is nothing to resolve; the file exists as everywhere.
rm -f "$root/etc/resolv.conf"
echo 'nameserver 127.0.0.1' > "$root/etc/resolv.conf"
: > "$root/etc/machine-id"
mkdir "$root/payload"
