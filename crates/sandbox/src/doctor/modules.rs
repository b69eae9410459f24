//! What the kernel has built in, has loaded, and could load.

use std::fs;
use std::path::Path;

/// How the kernel has a driver or file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Presence {
    /// Built in, or loaded.
    There,
    /// It is loaded when it is first asked for.
    Loadable,
    /// The lists of this kernel's modules do not have it.
    Absent,
    /// There are no such lists, as in a container.
    NoLists,
}

/// Looks for a module by its name, such as `nf_tables`; `root` is `/`.
pub(super) fn find(root: &Path, release: &str, name: &str) -> Presence {
    if root.join("sys/module").join(name).is_dir() {
        return Presence::There;
    }
    // Most distributions have /lib as a link to /usr/lib; some containers bind one of both.
    let lists = ["lib/modules", "usr/lib/modules"].map(|directory| root.join(directory).join(release));
    let Some((builtin, loadable)) = lists.iter().find_map(|directory| read(directory)) else { return Presence::NoLists };
    if names(&builtin).any(|found| found == name) {
        return Presence::There;
    }
    // Of each line of modules.dep the part before the colon is the module, the rest is what it needs.
    let modules = loadable.lines().filter_map(|line| line.split(':').next()).collect::<Vec<_>>().join("\n");
    if names(&modules).any(|found| found == name) { Presence::Loadable } else { Presence::Absent }
}

fn read(directory: &Path) -> Option<(String, String)> {
    let loadable = fs::read_to_string(directory.join("modules.dep")).ok()?;
    Some((fs::read_to_string(directory.join("modules.builtin")).unwrap_or_default(), loadable))
}

/// The names of the modules in a list of paths. Files have `-` where names have `_`, as their author liked.
fn names(list: &str) -> impl Iterator<Item = String> {
    list.lines().filter_map(|path| Some(path.rsplit('/').next()?.split(".ko").next()?.replace('-', "_")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_found_in_the_lists_of_the_running_kernel() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("lib/modules/6.1.0");
        assert_eq!(find(root.path(), "6.1.0", "veth"), Presence::NoLists);
        fs::create_dir_all(&directory).unwrap();
        fs::create_dir_all(root.path().join("sys/module/overlay")).unwrap();
        fs::write(directory.join("modules.builtin"), "kernel/fs/ext4/ext4.ko\nkernel/net/x-y.ko\n").unwrap();
        let dep = "kernel/drivers/net/veth.ko.zst: kernel/net/other.ko.zst\nkernel/net/netfilter/nf_tables.ko:\n";
        fs::write(directory.join("modules.dep"), dep).unwrap();
        for (name, presence) in [
            ("overlay", Presence::There),
            ("ext4", Presence::There),
            ("x_y", Presence::There),
            ("veth", Presence::Loadable),
            ("nf_tables", Presence::Loadable),
            ("other", Presence::Absent),
            ("erofs", Presence::Absent),
        ] {
            assert_eq!(find(root.path(), "6.1.0", name), presence, "{name}");
        }
        assert_eq!(find(root.path(), "6.2.0", "veth"), Presence::NoLists);
    }
}
