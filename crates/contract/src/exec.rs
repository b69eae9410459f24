//! A command besides the main program of an instance, as its user asks for it and as it is run.

use std::io;

use funtainer_model::{EnvVar, ErrorCode, Failure};

use crate::plan::{FileStat, ImageFiles, PlanError, StartPlan, User, check_size, identity, working_dir};
use crate::terminal::TerminalSize;

/// What a terminal without a better name is called, as in Docker.
const TERM: (&str, &str) = ("TERM", "xterm");

/// A command as its user asks for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecRequest {
    /// Command line.
    pub command: Vec<String>,
    /// Variables on top of the instance's.
    pub env: Vec<EnvVar>,
    /// Replaces the instance's working directory.
    pub working_dir: Option<String>,
    /// Replaces the instance's user: `user`, `uid`, `user:group`, `uid:gid` by the image's own files.
    pub user: Option<String>,
    /// Whether it has a terminal, and its size at first.
    pub terminal: Option<TerminalSize>,
}

/// A command with everything that it depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecPlan {
    /// Command line; the first is the program, absolute or found through `PATH` of `env` inside the instance.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: Vec<EnvVar>,
    /// Absolute directory to start in; it must be there.
    pub working_dir: String,
    /// Who runs it.
    pub user: User,
    /// Whether it has a terminal, and its size at first.
    pub terminal: Option<TerminalSize>,
}

/// What a command in an instance of `plan` is. Where the request says nothing it has what the instance's own program has.
/// `files` say who another user is, whose home directory then becomes `HOME`; without them only numbers are known.
pub fn exec(plan: &StartPlan, files: Option<&dyn ImageFiles>, request: ExecRequest) -> Result<ExecPlan, PlanError> {
    let ExecRequest { command: argv, env: own, working_dir: directory, user, terminal } = request;
    if argv.first().is_none_or(String::is_empty) {
        return Err(PlanError::NoCommand);
    }
    if argv.iter().any(|argument| argument.contains('\0')) {
        return Err(PlanError::Nul("the command line"));
    }
    let mut env = plan.env.clone();
    let (user, home) = match user {
        None => (plan.user.clone(), None),
        Some(user) => {
            let identity = identity(&user, files.unwrap_or(&NoFiles))?;
            (User { uid: identity.uid, gid: identity.gid, groups: identity.groups }, Some(identity.home))
        }
    };
    if let Some(home) = home {
        set(&mut env, EnvVar::new("HOME", &home).map_err(|_| PlanError::Nul("the home directory"))?);
    }
    if terminal.is_some() {
        name_terminal(&mut env);
    }
    for var in own {
        set(&mut env, var);
    }
    let working_dir = match directory {
        None => plan.working_dir.clone(),
        Some(directory) => working_dir(&directory)?,
    };
    check_size(&argv, &env)?;
    Ok(ExecPlan { argv, env, working_dir, user, terminal })
}

/// An image without files.
struct NoFiles;

impl ImageFiles for NoFiles {
    fn stat(&self, _path: &str) -> io::Result<Option<FileStat>> {
        Ok(None)
    }

    fn read(&self, _path: &str, _bytes_max: usize) -> io::Result<Option<Vec<u8>>> {
        Ok(None)
    }

    fn read_start(&self, _path: &str, _bytes_max: usize) -> io::Result<Option<Vec<u8>>> {
        Ok(None)
    }
}

/// Sets `TERM` unless it is set.
pub fn name_terminal(env: &mut Vec<EnvVar>) {
    let (name, value) = TERM;
    if !env.iter().any(|var| var.name() == name) {
        env.push(EnvVar::new(name, value).expect("a name and a value"));
    }
}

/// Why a command cannot be run, as users meet it.
pub fn failure(error: &PlanError) -> Failure {
    match error {
        PlanError::NoCommand => Failure::new(ErrorCode::CommandMissing, "no command is given")
            .with_hint("write it behind --, such as `funtainer exec NAME -- ls /`"),
        PlanError::Nul(what) => Failure::new(ErrorCode::BadRequest, format!("{what} contains a NUL character")),
        PlanError::TooLong { .. } => {
            Failure::new(ErrorCode::BadRequest, error.to_string()).with_hint("give what is long on standard input")
        }
        PlanError::IdTooLarge(_) | PlanError::TooManyGroups(_) => {
            Failure::new(ErrorCode::BadSetting, error.to_string()).with_hint("ids up to 65535 and 64 groups can be used")
        }
        error => error.failure(),
    }
}

fn set(env: &mut Vec<EnvVar>, var: EnvVar) {
    env.retain(|old| old.name() != var.name());
    env.push(var);
}

#[cfg(test)]
mod tests {
    use funtainer_model::{Contract, FunctionId, FunctionSpec, ImageConfig};

    use super::*;

    struct Files;

    impl ImageFiles for Files {
        fn stat(&self, _path: &str) -> io::Result<Option<FileStat>> {
            Ok(None)
        }

        fn read(&self, path: &str, _bytes_max: usize) -> io::Result<Option<Vec<u8>>> {
            Ok(match path {
                "/etc/passwd" => Some(b"app:x:1000:100::/srv/app:/bin/sh\n".to_vec()),
                "/etc/group" => Some(b"staff:x:50:app\n".to_vec()),
                _ => None,
            })
        }

        fn read_start(&self, _path: &str, _bytes_max: usize) -> io::Result<Option<Vec<u8>>> {
            Ok(None)
        }
    }

    fn var(text: &str) -> EnvVar {
        text.parse().unwrap()
    }

    fn plan() -> StartPlan {
        let config = ImageConfig { entrypoint: vec!["/server".to_owned()], ..ImageConfig::default() };
        let id = FunctionId::in_default("f".parse().unwrap());
        let spec = FunctionSpec::new(id, "image".parse().unwrap(), Contract::Http);
        let mut plan = crate::plan(&config, &Files, &spec).unwrap();
        plan.env = vec![var("PATH=/bin"), var("HOME=/root"), var("A=1")];
        plan.working_dir = "/srv".to_owned();
        plan.user = User { uid: 7, gid: 8, groups: vec![9] };
        plan
    }

    fn request(command: &[&str]) -> ExecRequest {
        let command = command.iter().map(|&word| word.to_owned()).collect();
        ExecRequest { command, env: Vec::new(), working_dir: None, user: None, terminal: None }
    }

    #[test]
    fn it_has_what_the_instance_has() {
        let planned = exec(&plan(), Some(&Files), request(&["sh", "-c", "x"])).unwrap();
        let StartPlan { env, working_dir, user, .. } = plan();
        assert_eq!(planned, ExecPlan { argv: request(&["sh", "-c", "x"]).command, env, working_dir, user, terminal: None });
    }

    #[test]
    fn what_is_asked_for_replaces_it() {
        let asked = ExecRequest {
            env: vec![var("A=2"), var("B=3")],
            working_dir: Some("tmp/../var//log/".to_owned()),
            user: Some("app".to_owned()),
            terminal: Some(TerminalSize { rows: 1, columns: 2 }),
            ..request(&["sh"])
        };
        let planned = exec(&plan(), Some(&Files), asked.clone()).unwrap();
        let env: Vec<_> = planned.env.iter().map(ToString::to_string).collect();
        assert_eq!(env, ["PATH=/bin", "HOME=/srv/app", "TERM=xterm", "A=2", "B=3"]);
        assert_eq!(planned.working_dir, "/var/log");
        assert_eq!(planned.user, User { uid: 1000, gid: 100, groups: vec![100, 50] });
        let named = exec(&plan(), Some(&Files), ExecRequest { env: vec![var("TERM=vt100"), var("HOME=/")], ..asked }).unwrap();
        assert!(named.env.contains(&var("TERM=vt100")) && named.env.contains(&var("HOME=/")), "{:?}", named.env);
    }

    #[test]
    fn what_cannot_be_run_is_refused() {
        let refused = |request| exec(&plan(), Some(&Files), request).unwrap_err();
        assert!(matches!(refused(request(&[])), PlanError::NoCommand));
        assert!(matches!(refused(request(&["", "x"])), PlanError::NoCommand));
        assert!(matches!(refused(request(&["a", "b\0"])), PlanError::Nul(_)));
        assert!(matches!(refused(request(&["a", &"x".repeat(100_000)])), PlanError::TooLong { .. }));
        let stranger = ExecRequest { user: Some("nobody-here".to_owned()), ..request(&["a"]) };
        assert!(matches!(refused(stranger), PlanError::UserUnknown(_)));
        let by_number = ExecRequest { user: Some("12:34".to_owned()), ..request(&["a"]) };
        assert_eq!(exec(&plan(), None, by_number).unwrap().user, User { uid: 12, gid: 34, groups: vec![34] });
        let nowhere = ExecRequest { working_dir: Some("a\0".to_owned()), ..request(&["a"]) };
        assert!(matches!(refused(nowhere), PlanError::Nul(_)));
    }
}
