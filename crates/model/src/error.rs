//! Codes of the failures that users see. A code is stable: scripts and dashboards match on it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Whose fault a failure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fault {
    /// The request is wrong.
    Client,
    /// The image or its process is.
    Function,
    /// This platform, or a system that it depends on.
    Platform,
}

/// A failure as users meet it: what happened to which object, and what to do next. Built from a typed error at the edge of a crate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The stable code.
    pub code: ErrorCode,
    /// One sentence with the object (name, digest, path).
    pub detail: String,
    /// What to do next; the code's own hint where nothing better is known.
    pub hint: String,
}

impl Failure {
    /// A failure with the hint of its code.
    pub fn new(code: ErrorCode, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into(), hint: code.hint().to_owned() }
    }

    /// The same with a hint that knows more.
    pub fn with_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: hint.into(), ..self }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.detail)
    }
}

impl std::error::Error for Failure {}

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $fault:ident, retry $retry:literal, $title:literal, $hint:literal;)*) => {
        /// The stable code of a failure.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum ErrorCode {
            $($(#[$doc])* #[serde(rename = $text)] $name,)*
        }

        impl ErrorCode {
            /// Every code, for docs and tests.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// The code as scripts match it: lower-case words joined by `-`.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// Whose fault it is.
            pub const fn fault(self) -> Fault {
                match self { $(Self::$name => Fault::$fault,)* }
            }

            /// Whether the same request can be sent again without harm and with hope.
            pub const fn retry_is_safe(self) -> bool {
                match self { $(Self::$name => $retry,)* }
            }

            /// The same few words for every failure of the code (RFC 9457 section 3.1.3).
            pub const fn title(self) -> &'static str {
                match self { $(Self::$name => $title,)* }
            }

            /// What to do next.
            pub const fn hint(self) -> &'static str {
                match self { $(Self::$name => $hint,)* }
            }
        }
    };
}

codes! {
    /// The request cannot be understood: JSON, query, header or path.
    BadRequest = "bad-request", Client, retry false, "the request cannot be understood", "compare the request with `funtainer help` or docs/api.md";
    /// A setting has a value that cannot be served.
    BadSetting = "bad-setting", Client, retry false, "a setting cannot be served", "see `funtainer deploy --help` for the settings and their ranges";
    /// A name breaks its grammar.
    BadName = "bad-name", Client, retry false, "not a valid name", "use letters, digits and '-' in function names";
    /// An image reference breaks its grammar.
    BadImageReference = "bad-image-reference", Client, retry false, "not a valid image reference", "write [registry/]repository[:tag][@sha256:..], such as docker.io/library/nginx:1.27";
    /// No such path in the API.
    UnknownPath = "unknown-path", Client, retry false, "no such path", "functions are called at /function/NAME";
    /// The path does not take the method.
    MethodNotAllowed = "method-not-allowed", Client, retry false, "the path does not take this method", "the header Allow names the methods that it takes";
    /// Heads of requests have a bound.
    HeaderTooLarge = "header-too-large", Client, retry false, "the request's header is too large", "send less than 64 KiB of header; large values belong into the body";
    /// Bodies have a bound where they must be held in memory.
    BodyTooLarge = "body-too-large", Client, retry false, "the request's body is too large", "send a smaller body";
    /// Another protocol on the same connection.
    UpgradeUnsupported = "upgrade-unsupported", Client, retry false, "the connection cannot change its protocol", "use plain HTTP/1.1; WebSocket is not supported so far";
    /// Connections have a bound.
    TooManyConnections = "too-many-connections", Platform, retry true, "too many connections are open", "close idle connections, or try again later";
    /// No function of the name.
    FunctionUnknown = "function-unknown", Client, retry false, "no such function", "`funtainer list` shows the functions, `funtainer deploy NAME --image REF` makes one";
    /// Removed or replaced while the request was under way.
    FunctionRemoved = "function-removed", Client, retry false, "the function was removed meanwhile", "deploy it again";
    /// No instance of the id.
    InstanceUnknown = "instance-unknown", Client, retry false, "no such instance", "`funtainer describe NAME` shows the instances of a function";
    /// No instance that a command could run in.
    NotRunning = "not-running", Client, retry true, "no instance is running", "--start starts one first, as `funtainer scale NAME 1` does";
    /// The registry has no such image or tag.
    ImageUnknown = "image-unknown", Client, retry false, "no such image", "check the name and the tag with `skopeo inspect docker://REF`, or import one with `funtainer image import`";
    /// The registry wants credentials that we lack.
    ImageForbidden = "image-forbidden", Client, retry false, "the registry denies access to the image", "only images that can be pulled anonymously can be used so far";
    /// The registry cannot be reached or answers with errors.
    RegistryUnavailable = "registry-unavailable", Platform, retry true, "the registry cannot be asked", "check the registry's address and the network, then try again";
    /// Content does not have the digest that names it.
    DigestMismatch = "digest-mismatch", Platform, retry true, "content does not match its digest", "pull again; if it stays, the registry or a proxy before it is damaged";
    /// Manifest, config or layer breaks its format.
    ImageInvalid = "image-invalid", Function, retry false, "the image is not valid", "build the image anew with an up-to-date tool";
    /// An image for another processor or system.
    ImagePlatform = "image-platform", Client, retry false, "the image is not for this machine", "build or choose an image for linux and this processor";
    /// A feature that is not served.
    ImageUnsupported = "image-unsupported", Client, retry false, "the image uses something that is not supported", "convert the image, for example with `skopeo copy --dest-compress-format gzip`";
    /// Neither ENTRYPOINT, CMD nor args.
    CommandMissing = "command-missing", Function, retry false, "the image names no command", "give the command with --arg";
    /// The command's file is not in the image.
    CommandNotFound = "command-not-found", Function, retry false, "the command is not in the image", "check ENTRYPOINT and CMD of the image, or give another command with --arg";
    /// The command's file cannot be executed.
    CommandNotExecutable = "command-not-executable", Function, retry false, "the command cannot be executed", "set its execute bits, and check that it is a program for this processor with its interpreter in the image";
    /// The USER of the image does not exist in it.
    UserUnknown = "user-unknown", Function, retry false, "the image's user is not in its /etc/passwd", "use a numeric USER in the image";
    /// The process ended before it was ready.
    InstanceExited = "instance-exited", Function, retry false, "the function ended before it was ready", "see `funtainer logs NAME`";
    /// Not ready in time.
    StartTimeout = "start-timeout", Function, retry false, "the function was not ready in time", "see `funtainer logs NAME`; a server must listen on PORT, set another with --port";
    /// Listens on several ports, none of which is PORT.
    PortAmbiguous = "port-ambiguous", Function, retry false, "the function listens on several ports", "name the one to use with --port";
    /// The instance broke the connection before an answer.
    FunctionFailed = "function-failed", Function, retry false, "the function failed", "see `funtainer logs NAME`";
    /// A command ended with another exit code than 0.
    CommandFailed = "command-failed", Function, retry false, "the command failed", "the exit code and the end of its standard error are in the detail; all of it in `funtainer logs NAME`";
    /// The function said something that its dialect does not have.
    FunctionProtocol = "function-protocol", Function, retry false, "the function broke its protocol", "check that the contract fits the image: --contract http or stdio";
    /// Killed by the kernel for its memory.
    OutOfMemory = "out-of-memory", Function, retry false, "the function used more memory than it may", "give it more with --memory";
    /// The call took too long.
    CallTimeout = "call-timeout", Function, retry false, "the call took too long", "set a longer --timeout";
    /// The queue of the function is full.
    QueueFull = "queue-full", Client, retry true, "too many calls are waiting", "try again after the time in Retry-After, or raise --max or --concurrency";
    /// Waited for a slot until the call's time was over.
    QueueTimeout = "queue-timeout", Client, retry true, "no instance became free in time", "raise --max or --concurrency";
    /// A number of instances outside min..max.
    ScaleOutOfRange = "scale-out-of-range", Client, retry false, "outside the function's min and max", "deploy with another --min or --max, or scale to 0";
    /// A slug or name is already taken by another function.
    NameTaken = "name-taken", Client, retry false, "the name is taken", "choose another name";
    /// The platform is about to stop.
    ShuttingDown = "shutting-down", Platform, retry true, "the server is stopping", "try again once it is started";
    /// The kernel or the keeper refused a start.
    SandboxFailed = "sandbox-failed", Platform, retry true, "the container could not be started", "see the server's log; on machines without a needed kernel feature `funtainer serve` names it";
    /// Disk, database or another part of the platform.
    Internal = "internal", Platform, retry true, "the platform failed", "see the server's log";
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_words() {
        for (i, code) in ErrorCode::ALL.iter().enumerate() {
            assert!(code.as_str().bytes().all(|b| b.is_ascii_lowercase() || b == b'-'), "{code}");
            assert!(ErrorCode::ALL[i + 1..].iter().all(|other| other.as_str() != code.as_str()), "{code}");
        }
    }
}
