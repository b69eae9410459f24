//! The one place where a failure becomes an HTTP answer: a status, and a body for people (text) or for programs (RFC 9457).

use std::time::Duration;

use funtainer_engine::InvokeFailure;
use funtainer_model::{CallId, ErrorCode, Failure, Fault};
use http::header::{ACCEPT, ALLOW, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use http::{Response, StatusCode};
use serde::{Deserialize, Serialize};

use crate::body::Body;

/// Names the call in every answer.
pub(crate) const CALL_ID: HeaderName = HeaderName::from_static("x-call-id");
/// The code of a failure that the platform reports, and not the function. Never passed on from a function.
pub const ERROR_CODE: HeaderName = HeaderName::from_static("x-funtainer-error");
/// Media type of RFC 9457.
pub const PROBLEM_JSON: &str = "application/problem+json";

/// When a caller may try again after a refusal whose reason passes quickly: an instance starts in milliseconds.
const RETRY_SOON: Duration = Duration::from_secs(1);

/// On what occasion something failed: a function that cannot be started is the deployer's business at a deploy, and a bad gateway to a
/// caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Occasion {
    /// A call to a function.
    Call,
    /// A request to the admin API.
    Admin,
}

/// Who reads the body of an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reader {
    /// `text/plain`.
    Person,
    /// `application/problem+json`.
    Program,
}

/// What failed, ready to be answered.
#[derive(Debug, Clone)]
pub(crate) struct Rescue {
    /// What happened.
    pub(crate) failure: Failure,
    /// When a later try has hope.
    pub(crate) retry_after: Option<Duration>,
    /// The methods that the path takes.
    pub(crate) allow: Option<HeaderValue>,
}

/// A failure as RFC 9457 writes it. Also the last line of a stream of events, and the last frame of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// `urn:funtainer:error:` and the code.
    pub r#type: String,
    /// The same few words for every failure of the code.
    pub title: String,
    /// HTTP status.
    pub status: u16,
    /// One sentence with the object.
    pub detail: String,
    /// The stable code.
    pub code: ErrorCode,
    /// What to do next.
    pub hint: String,
    /// As in the header `X-Call-Id`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub call_id: Option<CallId>,
}

impl From<Failure> for Rescue {
    fn from(failure: Failure) -> Self {
        let retry_after = match failure.code {
            ErrorCode::QueueFull
            | ErrorCode::QueueTimeout
            | ErrorCode::ShuttingDown
            | ErrorCode::SandboxFailed
            | ErrorCode::TooManyConnections => Some(RETRY_SOON),
            _ => None,
        };
        Self { failure, retry_after, allow: None }
    }
}

impl From<&InvokeFailure> for Rescue {
    fn from(error: &InvokeFailure) -> Self {
        let retry_after = error.retry_after();
        let rescue = Self::from(error.failure());
        Self { retry_after: retry_after.or(rescue.retry_after), ..rescue }
    }
}

impl Rescue {
    /// The answer.
    pub(crate) fn answer(&self, occasion: Occasion, reader: Reader, id: CallId) -> Response<Body> {
        let (status, headers, body) = self.parts(occasion, reader, id);
        let mut response = Response::new(Body::full(body));
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        response
    }

    /// The answer, in parts.
    pub(crate) fn parts(&self, occasion: Occasion, reader: Reader, id: CallId) -> (StatusCode, HeaderMap, Vec<u8>) {
        let (media_type, body) = match reader {
            Reader::Person => {
                let Failure { code, detail, hint } = &self.failure;
                ("text/plain; charset=utf-8", format!("error[{code}]: {detail}\nhint: {hint}\n").into_bytes())
            }
            Reader::Program => {
                let problem = Problem::new(&self.failure, occasion, Some(id));
                (PROBLEM_JSON, serde_json::to_vec(&problem).expect("texts and numbers are always JSON"))
            }
        };
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
        headers.insert(ERROR_CODE, HeaderValue::from_static(self.failure.code.as_str()));
        headers.insert(CALL_ID, call_id_value(id));
        if let Some(after) = self.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(after.as_secs().max(1)));
        }
        if let Some(allow) = &self.allow {
            headers.insert(ALLOW, allow.clone());
        }
        (status(self.failure.code, occasion), headers, body)
    }

    /// Says it in the log, once: platform's faults as errors, functions' as warnings, callers' only when asked for.
    pub(crate) fn log(&self, id: CallId, source: Option<&(dyn std::error::Error + 'static)>) {
        let Failure { code, detail, .. } = &self.failure;
        let chain = source.map(chain).unwrap_or_default();
        match code.fault() {
            Fault::Platform => tracing::error!(call = %id, %code, "{detail}{chain}"),
            Fault::Function => tracing::warn!(call = %id, %code, "{detail}{chain}"),
            Fault::Client => tracing::debug!(call = %id, %code, "{detail}{chain}"),
        }
    }
}

impl Problem {
    pub(crate) fn new(failure: &Failure, occasion: Occasion, id: Option<CallId>) -> Self {
        Self {
            r#type: format!("urn:funtainer:error:{}", failure.code),
            title: failure.code.title().to_owned(),
            status: status(failure.code, occasion).as_u16(),
            detail: failure.detail.clone(),
            code: failure.code,
            hint: failure.hint.clone(),
            call_id: id,
        }
    }
}

impl Reader {
    /// Whom `Accept` prefers; `otherwise` where it has no preference.
    pub(crate) fn of(headers: &HeaderMap, otherwise: Self) -> Self {
        let (mut program, mut person) = (0, 0);
        for range in headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(',')) {
            let mut parts = range.split(';').map(str::trim);
            let media_type = parts.next().unwrap_or_default();
            let quality =
                parts.find_map(|part| part.strip_prefix("q=").or_else(|| part.strip_prefix("Q="))).map_or(1000, quality);
            let is = |names: &[&str]| names.iter().any(|name| media_type.eq_ignore_ascii_case(name));
            if is(&[PROBLEM_JSON, "application/json", "application/*", "application/x-ndjson"]) {
                program = program.max(quality);
            } else if is(&["text/plain", "text/html", "text/*"]) {
                person = person.max(quality);
            }
        }
        match program.cmp(&person) {
            std::cmp::Ordering::Greater => Self::Program,
            std::cmp::Ordering::Less => Self::Person,
            std::cmp::Ordering::Equal => otherwise,
        }
    }
}

/// The id as a header has it.
pub(crate) fn call_id_value(id: CallId) -> HeaderValue {
    let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
    let text = uuid::Uuid::from_bytes(id.to_bytes()).hyphenated().encode_lower(&mut text);
    HeaderValue::from_str(text).expect("hex digits and hyphens")
}

/// An error with its sources, each with a colon before.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = String::new();
    let mut next = error.source();
    while let Some(source) = next {
        text.push_str(": ");
        text.push_str(&source.to_string());
        next = source.source();
    }
    text
}

/// Thousandths; what is no weight (RFC 9110 section 12.4.2) counts as nothing.
fn quality(text: &str) -> u32 {
    text.parse::<f32>().ok().filter(|weight| (0.0..=1.0).contains(weight)).map_or(0, |weight| (weight * 1000.0) as u32)
}

fn status(code: ErrorCode, occasion: Occasion) -> StatusCode {
    use ErrorCode as E;
    match code {
        E::BadRequest | E::BadSetting | E::BadName | E::BadImageReference => StatusCode::BAD_REQUEST,
        E::UnknownPath | E::FunctionUnknown | E::InstanceUnknown | E::ImageUnknown => StatusCode::NOT_FOUND,
        E::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
        E::HeaderTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
        E::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        E::UpgradeUnsupported => StatusCode::NOT_IMPLEMENTED,
        E::FunctionRemoved => StatusCode::GONE,
        E::ImageForbidden => StatusCode::FORBIDDEN,
        E::RegistryUnavailable | E::DigestMismatch => StatusCode::BAD_GATEWAY,
        E::ScaleOutOfRange | E::NameTaken | E::NotRunning => StatusCode::CONFLICT,
        E::QueueFull => StatusCode::TOO_MANY_REQUESTS,
        E::QueueTimeout | E::ShuttingDown | E::SandboxFailed | E::TooManyConnections => StatusCode::SERVICE_UNAVAILABLE,
        E::CallTimeout => StatusCode::GATEWAY_TIMEOUT,
        E::CommandFailed | E::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        E::StartTimeout if occasion == Occasion::Call => StatusCode::GATEWAY_TIMEOUT,
        E::ImageInvalid
        | E::ImagePlatform
        | E::ImageUnsupported
        | E::CommandMissing
        | E::CommandNotFound
        | E::CommandNotExecutable
        | E::UserUnknown
        | E::InstanceExited
        | E::StartTimeout
        | E::PortAmbiguous
        | E::FunctionFailed
        | E::FunctionProtocol
        | E::OutOfMemory => match occasion {
            Occasion::Call => StatusCode::BAD_GATEWAY,
            Occasion::Admin => StatusCode::UNPROCESSABLE_ENTITY,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accept_decides_who_reads() {
        let check = |accept: &str, expect: Option<Reader>| {
            let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_str(accept).unwrap())]);
            for otherwise in [Reader::Person, Reader::Program] {
                assert_eq!(Reader::of(&headers, otherwise), expect.unwrap_or(otherwise), "{accept}");
            }
        };
        check("*/*", None);
        check("", None);
        check("application/json", Some(Reader::Program));
        check("application/problem+json, */*;q=0.1", Some(Reader::Program));
        check("text/plain", Some(Reader::Person));
        check("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", Some(Reader::Person));
        check("text/plain;q=0.5, application/json;q=0.4", Some(Reader::Person));
        check("text/plain;q=0.5, application/json;q=0.6", Some(Reader::Program));
        check("application/json;q=nan", None);
        check("application/json;q=7", None);
        assert_eq!(Reader::of(&HeaderMap::new(), Reader::Program), Reader::Program);
    }

    #[test]
    fn every_code_is_an_error_on_every_occasion() {
        for code in ErrorCode::ALL {
            for occasion in [Occasion::Call, Occasion::Admin] {
                let status = status(*code, occasion);
                assert!(status.is_client_error() || status.is_server_error(), "{code}");
                let for_caller = code.fault() == Fault::Function && occasion == Occasion::Call;
                assert!(!for_caller || status.is_server_error(), "{code} is the function's fault, not the caller's");
            }
        }
    }
}
