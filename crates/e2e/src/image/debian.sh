# Makes layers of Debian's packages: one base, and for each set of packages what its installation changes on it.
#
#   debian.sh DIRECTORY SOURCES SUITE NAME=PACKAGES...
#
# Writes DIRECTORY/base.tar and DIRECTORY/NAME.tar. To be run in a mount and a pid namespace of its own: everything happens on a tmpfs, which
# spares the disk dpkg's many small writes, and vanishes with the namespaces.
set -euo pipefail
out=$1 sources=$2 suite=$3
shift 3
say() { echo "debian: $*" >&2; }

mkdir "$out/work"
mount -t tmpfs -o mode=755 funtainer-debian "$out/work"
cd "$out/work"
mkdir base tmp

say "fetching and unpacking the base of $suite"
without=('/usr/share/doc/*' '/usr/share/info/*' '/usr/share/locale/*' '/usr/share/man/*')
TMPDIR=$PWD/tmp mmdebstrap --quiet --variant=apt --skip=cleanup/apt/lists --aptopt='Acquire::Languages "none"' \
    "${without[@]/#/--dpkgopt=path-exclude=}" "$suite" base
# Packages link their pages there, whether the pages are wanted or not.
mkdir -p base/usr/share/man/man{1,5,7,8}

# One set of packages on the base, in an overlay of its own.
install_set() {
    local name=$1 packages=$2 root=$1/root upper=$1/upper
    mkdir -p "$upper" "$name/work" "$root"
    mount -t overlay -o "lowerdir=base,upperdir=$upper,workdir=$name/work,index=off,metacopy=off,redirect_dir=off" overlay "$root"
    mount -t proc proc "$root/proc"
    mount --bind /dev "$root/dev"
    # Nothing is started, and no database made: that is for the image's own start.
    printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
    chmod 755 "$root/usr/sbin/policy-rc.d"
    if [ "$name" = postgres ]; then
        mkdir -p "$root/etc/postgresql-common"
        echo 'create_main_cluster = false' >"$root/etc/postgresql-common/createcluster.conf"
    fi
    local inside=(env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root DEBIAN_FRONTEND=noninteractive chroot "$root")
    # shellcheck disable=SC2086
    if ! "${inside[@]}" apt-get --quiet --quiet --yes --no-install-recommends -o Dpkg::Options::=--force-confold \
        -o APT::Sandbox::User=root install $packages </dev/null >"$name/log" 2>&1; then
        tail -n 40 "$name/log" >&2
        say "$packages cannot be installed"
        return 1
    fi
    if [ "$name" = jvm ]; then
        mkdir "$root/app"
        cp "$sources/Server.java" "$root/app"
        "${inside[@]}" java -m jdk.compiler/com.sun.tools.javac.Main -d /app /app/Server.java
    fi
    if [ "$name" = postgres ]; then
        "${inside[@]}" install --directory --owner postgres --group postgres --mode 1777 /var/lib/postgresql/data
    fi
    umount "$root/dev" "$root/proc" "$root"
    rm -rf "$upper"/{var/cache/apt,var/cache/debconf,var/lib/apt,var/log,usr/sbin/policy-rc.d,root/.cache}
    # What the installation deleted, as layers say it.
    find "$upper" -type c | while read -r path; do
        rm "$path"
        : >"$(dirname "$path")/.wh.$(basename "$path")"
    done
    pack "$upper" "$out/$name.tar"
    say "$name: $(du -sm "$upper" | cut -f 1) MB"
    rm -rf "$name"
}

pack() {
    tar --create --file "$2" --directory "$1" --numeric-owner --xattrs --xattrs-include='security.*' --xattrs-include='user.*' \
        --exclude='./dev/*' --exclude='./var/lib/apt/lists/*' .
}

# Two at once: one fetches while the other unpacks.
export -f install_set pack say
export out sources
printf '%s\n' "$@" | xargs --max-procs=2 --replace bash -c 'set -euo pipefail; set="{}"; install_set "${set%%=*}" "${set#*=}"'
pack base "$out/base.tar"
say "base: $(du -sm base | cut -f 1) MB"
