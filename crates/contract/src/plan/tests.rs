use std::collections::BTreeMap;

use super::*;

/// An image of files given as (path, mode, content); a trailing slash makes a directory.
struct Image(BTreeMap<String, (u32, Vec<u8>)>);

impl Image {
    fn new(files: &[(&str, u32, &str)]) -> Self {
        Self(files.iter().map(|(path, mode, content)| ((*path).to_owned(), (*mode, content.as_bytes().to_vec()))).collect())
    }
}

impl ImageFiles for Image {
    fn stat(&self, path: &str) -> io::Result<Option<FileStat>> {
        assert!(path.starts_with('/'), "{path}");
        if path.contains("damaged") {
            return Err(io::Error::other("damaged"));
        }
        let stat = |kind, mode| FileStat { kind, mode, uid: 0, gid: 50, size: 0 };
        if self.0.contains_key(&format!("{path}/")) {
            return Ok(Some(stat(FileKind::Directory, 0o755)));
        }
        Ok(self.0.get(path).map(|(mode, _)| stat(FileKind::Regular, *mode)))
    }

    fn read(&self, path: &str, bytes_max: usize) -> io::Result<Option<Vec<u8>>> {
        let content = self.0.get(path).map(|(_, content)| content.clone());
        if content.as_ref().is_some_and(|content| content.len() > bytes_max) {
            return Err(io::Error::from(io::ErrorKind::FileTooLarge));
        }
        Ok(content)
    }

    fn read_start(&self, path: &str, bytes_max: usize) -> io::Result<Option<Vec<u8>>> {
        Ok(self.0.get(path).map(|(_, content)| content[..content.len().min(bytes_max)].to_vec()))
    }
}

fn image() -> Image {
    Image::new(&[
        ("/etc/passwd", 0o644, "root:x:0:0::/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n"),
        ("/etc/group", 0o644, "staff:x:50:app\n"),
        ("/bin/cat", 0o755, ""),
        ("/bin/data", 0o644, ""),
        ("/usr/bin/data", 0o755, ""),
        ("/bin/dir/", 0o755, ""),
        ("/bin/private", 0o700, ""),
        ("/bin/staff", 0o710, ""),
        ("/srv/run", 0o755, ""),
        ("/srv/bin/tool", 0o755, ""),
        ("/bin/script", 0o755, "#!/bin/cat -n\n"),
        ("/bin/nested", 0o755, "#! /bin/script\n"),
        ("/bin/relative", 0o755, "#!bin/tool\n"),
        ("/bin/itself", 0o755, "#!/bin/itself\n"),
        ("/bin/lost", 0o755, "#!/usr/bin/perl -w\n"),
        ("/bin/lost-nested", 0o755, "#!/bin/lost\n"),
        ("/bin/by-data", 0o755, "#!/bin/data\n"),
        ("/bin/dos", 0o755, "#!/bin/cat\r\n"),
    ])
}

fn spec(contract: Contract, change: impl FnOnce(&mut FunctionSpec)) -> FunctionSpec {
    let id = funtainer_model::FunctionId::in_default("f".parse().unwrap());
    let mut spec = FunctionSpec::new(id, "img".parse().unwrap(), contract);
    change(&mut spec);
    spec.check().unwrap()
}

fn config(entrypoint: &[&str], cmd: &[&str]) -> ImageConfig {
    let owned = |parts: &[&str]| parts.iter().map(|part| (*part).to_owned()).collect();
    ImageConfig { entrypoint: owned(entrypoint), cmd: owned(cmd), ..ImageConfig::default() }
}

fn env_of(plan: &StartPlan) -> Vec<String> {
    plan.env.iter().map(ToString::to_string).collect()
}

#[test]
fn command_lines() {
    let check = |entrypoint: &[&str], cmd: &[&str], args: Option<&[&str]>, expect: &[&str]| {
        let args = args.map(|args| args.iter().map(|arg| (*arg).to_owned()).collect());
        let plan = plan(&config(entrypoint, cmd), &image(), &spec(Contract::Http, |spec| spec.args = args)).unwrap();
        assert_eq!(plan.argv, expect);
    };
    check(&["/e", "1"], &["c"], None, &["/e", "1", "c"]);
    check(&["/e", "1"], &["c"], Some(&["a", "b"]), &["/e", "1", "a", "b"]);
    check(&["/e"], &["c"], Some(&[]), &["/e"]);
    check(&[], &["c", "d"], None, &["c", "d"]);
    check(&[], &["c", "d"], Some(&["a"]), &["a"]);
}

#[test]
fn entrypoints_of_the_functions_own() {
    let check = |entrypoint: &[&str], args: Option<&[&str]>, expect: Result<&[&str], &str>| {
        let owned = |parts: &[&str]| parts.iter().map(|part| (*part).to_owned()).collect::<Vec<_>>();
        let change = |spec: &mut FunctionSpec| {
            spec.entrypoint = Some(owned(entrypoint));
            spec.args = args.map(owned);
        };
        let plan = plan(&config(&["/e", "1"], &["c"]), &image(), &spec(Contract::Http, change));
        let argv = plan.map(|plan| plan.argv).map_err(|error| error.failure().code.as_str());
        assert_eq!(argv, expect.map(owned), "{entrypoint:?} {args:?}");
    };
    check(&["/own"], None, Ok(&["/own"]));
    check(&["/own", "x"], Some(&["a"]), Ok(&["/own", "x", "a"]));
    check(&[""], Some(&["/bin/cat", "a"]), Ok(&["/bin/cat", "a"]));
    check(&[], Some(&["a"]), Ok(&["a"]));
    check(&[""], None, Err("command-missing"));
}

#[test]
fn volumes_are_directories_once_each() {
    let check = |given: &[&str], tmpfs: &[&str], expect: Result<&[&str], &str>| {
        let config = ImageConfig { volumes: given.iter().map(ToString::to_string).collect(), ..config(&["/e"], &[]) };
        let spec = spec(Contract::Http, |spec| spec.isolation.tmpfs = tmpfs.iter().map(|text| text.parse().unwrap()).collect());
        let volumes = plan(&config, &image(), &spec).map(|plan| plan.volumes);
        let expect = expect.map(|paths| paths.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(volumes.map_err(|error| error.failure().code.as_str()), expect, "{given:?}");
    };
    check(&[], &[], Ok(&[]));
    check(&["/z", "/data/", "data", "/data/sub", "/bin/dir"], &[], Ok(&["/bin/dir", "/data", "/data/sub", "/z"]));
    check(&["/", "/dev/shm", "/proc", "/sys/../sys/fs", "/device"], &[], Ok(&["/device"]));
    check(&["/cache", "/data"], &["/cache:1M"], Ok(&["/data"]));
    check(&["/bin/cat"], &[], Err("image-invalid"));
    check(&["/a\0b"], &[], Err("image-invalid"));
    check(&["/damaged"], &[], Err("image-invalid"));
    let many: Vec<_> = (0..=VOLUMES_MAX).map(|number| format!("/v{number}")).collect();
    let many: Vec<_> = many.iter().map(String::as_str).collect();
    check(&many, &[], Err("image-unsupported"));
    assert!(plan(&config(&["/e"], &[]), &image(), &spec(Contract::Http, |_| {})).unwrap().isolation.no_new_privileges);
}

#[test]
fn users_and_directories_of_the_functions_own() {
    let image_config = ImageConfig { user: "app".into(), working_dir: "/srv".into(), ..config(&["/bin/cat"], &[]) };
    let own = spec(Contract::Http, |spec| {
        spec.user = Some("0:staff".into());
        spec.working_dir = Some("/own//dir/".into());
    });
    let plan = plan(&image_config, &image(), &own).unwrap();
    assert_eq!((plan.user, plan.working_dir.as_str()), (User { uid: 0, gid: 50, groups: vec![50] }, "/own/dir"));
    assert!(plan.env.iter().any(|var| var.to_string() == "HOME=/root"));
}

#[test]
fn environments() {
    let variables = |vars: &[&str]| vars.iter().map(|var| var.parse().unwrap()).collect::<Vec<EnvVar>>();
    let check = |image_env: &[&str], own: &[&str], contract, expect: &[&str]| {
        let config = ImageConfig { env: variables(image_env), ..config(&["/bin/cat"], &[]) };
        let plan = plan(&config, &image(), &spec(contract, |spec| spec.env = variables(own))).unwrap();
        assert_eq!(env_of(&plan), expect);
    };
    let path = format!("PATH={PATH_DEFAULT}");
    check(&[], &[], Contract::Http, &["PORT=8080", &path, "HOME=/root", "HOSTNAME=f"]);
    check(&[], &[], Contract::Stdio, &[&path, "HOME=/root", "HOSTNAME=f"]);
    check(&["A=1", "B=1", "A=2"], &["B=2", "C=3"], Contract::Stdio, &["A=2", "B=2", "C=3", &path, "HOME=/root", "HOSTNAME=f"]);
    check(
        &["PATH=/x", "HOME=/h", "PORT=3000"],
        &["HOSTNAME=0.0.0.0"],
        Contract::Http,
        &["PATH=/x", "HOME=/h", "PORT=8080", "HOSTNAME=0.0.0.0"],
    );
    check(&["PORT=3000"], &["PORT=4000"], Contract::Http, &["PORT=4000", &path, "HOME=/root", "HOSTNAME=f"]);
}

#[test]
fn ports() {
    let check = |exposed: &[u16], port: Option<u16>, env: Option<&str>, expect: u16| {
        let exposed_ports = exposed.iter().map(|port| NonZeroU16::new(*port).unwrap()).collect();
        let spec = spec(Contract::Http, |spec| {
            spec.port = port.and_then(NonZeroU16::new);
            spec.env.extend(env.map(|var| var.parse().unwrap()));
        });
        let plan = plan(&ImageConfig { exposed_ports, ..config(&["/e"], &[]) }, &image(), &spec).unwrap();
        assert_eq!(plan.readiness, Readiness::Listening { preferred: NonZeroU16::new(expect).unwrap() });
        if env.is_none() {
            assert!(env_of(&plan).contains(&format!("PORT={expect}")));
        }
    };
    check(&[], None, None, 8080);
    check(&[80], None, None, 80);
    check(&[80, 443], None, None, 8080);
    check(&[80], Some(9000), None, 9000);
    check(&[80], None, Some("PORT=5000"), 5000);
    check(&[80], None, Some("PORT=unix"), 80);
}

#[test]
fn working_directories() {
    let check = |text: &str, expect: &str| assert_eq!(working_dir(text).unwrap(), expect, "{text}");
    check("", "/");
    check("/", "/");
    check("app", "/app");
    check("//srv/./a/../b/", "/srv/b");
    check("/../../etc", "/etc");
    assert!(matches!(working_dir("/a\0b"), Err(PlanError::Nul(_))));
}

#[test]
fn users_and_the_rest() {
    let image_config = ImageConfig { user: "app".into(), stop_signal: "SIGQUIT".parse().ok(), ..config(&["/bin/cat"], &[]) };
    let plan = plan(&image_config, &image(), &spec(Contract::Stdio, |_| {})).unwrap();
    assert_eq!(plan.user, User { uid: 1000, gid: 1000, groups: vec![1000, 50] });
    assert_eq!(plan.stop_signal.number(), 3);
    assert_eq!((plan.streams, plan.readiness, plan.concurrency.get()), (StandardStreams::Call, Readiness::Executed, 1));
    assert!(env_of(&plan).contains(&"HOME=/home/app".to_owned()));
}

#[test]
fn commands_of_stdio_are_looked_for() {
    let check = |command: &str, user: &str, path: Option<&str>, expect: Result<(), &str>| {
        let mut config = ImageConfig { user: user.into(), working_dir: "/srv".into(), ..config(&[command], &[]) };
        config.env.extend(path.map(|path| EnvVar::new("PATH", path).unwrap()));
        let result = plan(&config, &image(), &spec(Contract::Stdio, |_| {})).map(drop);
        assert_eq!(result.map_err(|error| error.failure().code.as_str()), expect, "{command} {user} {path:?}");
    };
    let (missing, denied) = (Err("command-not-found"), Err("command-not-executable"));
    check("cat", "", None, Ok(()));
    check("/bin/cat", "", None, Ok(()));
    check("cat", "", Some("/usr/bin"), missing);
    check("data", "", Some("/bin:/usr/bin"), Ok(()));
    check("data", "", Some("/usr/bin:/bin"), Ok(()));
    check("/bin/data", "", None, denied);
    check("dir", "", None, denied);
    check("nothing", "", None, missing);
    check("", "", None, missing);
    check("run", "", None, missing);
    check("./run", "", None, Ok(()));
    check("run", "", Some("/bin:"), Ok(()));
    check("tool", "", Some("bin"), Ok(()));
    check("private", "", None, Ok(()));
    check("private", "1000", None, denied);
    check("staff", "app", None, Ok(()));
    check("staff", "app:app", None, Err("user-unknown"));
    check("staff", "app:1", None, denied);
    check("/damaged", "", None, Err("image-invalid"));
    check("script", "", None, Ok(()));
    check("nested", "", None, Ok(()));
    check("relative", "", None, Ok(()));
    check("itself", "", None, Ok(()));
    check("lost", "", None, denied);
    check("lost-nested", "", None, denied);
    check("by-data", "", None, denied);
    check("dos", "", None, denied);
}

#[test]
fn missing_interpreters_are_named() {
    let failure = |command: &str| {
        let error = plan(&config(&[command], &[]), &image(), &spec(Contract::Stdio, |_| {})).unwrap_err();
        let failure = error.failure();
        (failure.detail, failure.hint)
    };
    let (detail, hint) = failure("/bin/lost");
    assert_eq!(detail, "'/bin/lost' is in the image, but its interpreter '/usr/bin/perl' is not");
    assert!(hint.contains("/usr/bin/perl"), "{hint}");
    assert!(failure("/bin/dos").1.contains("line ends"));
}

#[test]
fn images_that_cannot_be_planned() {
    let check = |config: &ImageConfig, image: &Image, expect: &str| {
        let error = plan(config, image, &spec(Contract::Http, |_| {})).unwrap_err();
        assert_eq!(error.failure().code.as_str(), expect, "{error}");
        assert!(!error.failure().hint.is_empty());
    };
    check(&config(&[], &[]), &image(), "command-missing");
    check(&config(&["a\0b"], &[]), &image(), "image-invalid");
    check(&config(&[&"a".repeat(COMMAND_BYTES_MAX)], &[]), &image(), "image-unsupported");
    check(&ImageConfig { user: "nobody".into(), ..config(&["/e"], &[]) }, &image(), "user-unknown");
    check(&ImageConfig { user: "70000".into(), ..config(&["/e"], &[]) }, &image(), "image-unsupported");
    let large = "x".repeat(ACCOUNTS_FILE_BYTES_MAX + 1);
    check(&config(&["/e"], &[]), &Image::new(&[("/etc/passwd", 0o644, &large)]), "image-invalid");
}
