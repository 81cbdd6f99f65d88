//! Whether an answer is Close's. Pure.

use serde_json::Value;

use crate::cli::certify::cleanup::lead_id;
use crate::cli::certify::observations::NotFound;
use crate::close::{CloseError, Fault, Form, Response};

/// The error of an answer that says nothing about the request: Close does not work or does not accept the key, or
/// something in front of Close answered. `missing` is the answer of this Close for a missing record.
pub(super) fn fault(path: &str, response: &Response, missing: Option<NotFound>) -> Option<CloseError> {
    let status = response.status.as_u16();
    if response.status.is_success() {
        let body = serde_json::from_slice(&response.body).unwrap_or_default();
        let form = Form::of(&response.body);
        return (!is_answer_to(path, &body))
            .then_some(CloseError::Transient(Fault::Foreign { status, form }));
    }
    let is_missing = status == 404 && missing == Some(NotFound::of(status, &response.body));
    // certify sends nothing that is too large.
    match response.error(false) {
        CloseError::Transient(Fault::Foreign { .. }) if is_missing => None,
        error @ (CloseError::Transient(_)
        | CloseError::Unreachable(_)
        | CloseError::Unauthorized
        | CloseError::PlanLimit) => Some(error),
        CloseError::Forbidden | CloseError::NotFound | CloseError::Rejected(_) => None,
    }
}

/// Whether a body has what every successful answer to this path has.
fn is_answer_to(path: &str, body: &Value) -> bool {
    let path = path.split('?').next().unwrap_or_default();
    let mut parts = path.split('/').filter(|part| !part.is_empty());
    match (parts.next(), parts.next()) {
        (Some("lead" | "contact"), Some(id)) => body["id"] == id,
        // A creation, or a list.
        (Some("lead"), None) => lead_id(&body["id"]).is_some() || body["data"].is_array(),
        (Some("me"), _) => body["id"].is_string(),
        (_, _) => body["data"].is_array(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_of_something_else_is_a_fault() {
        let words = r#"{"error": "Empty query: Lead matching query does not exist."}"#;
        for (path, status, body, missing, is_fault) in [
            ("lead/lead_1/", 200, r#"{"id": "lead_1"}"#, None, false),
            ("lead/lead_1/", 200, r#"{"id": "lead_2"}"#, None, true),
            ("lead/lead_1/", 200, r#"{"status": "log in first"}"#, None, true),
            ("contact/cont_1/", 200, "<html>", None, true),
            ("lead/", 200, r#"{"id": "lead_1"}"#, None, false),
            ("lead/?id__in=lead_1", 200, r#"{"data": []}"#, None, false),
            ("data/search/", 200, r#"{"data": []}"#, None, false),
            ("data/search/", 200, "[]", None, true),
            ("me/", 200, r#"{"id": "user_1"}"#, None, false),
            ("me/", 200, "", None, true),
            ("contact/cont_1/", 400, r#"{"error": "no"}"#, None, false),
            ("contact/cont_1/", 400, "<html>", None, true),
            ("contact/cont_1/", 403, "<html>", None, true),
            ("event/", 403, r#"{"error": "no"}"#, None, false),
            ("contact/cont_1/", 401, r#"{"error": "no"}"#, None, true),
            ("contact/cont_1/", 500, r#"{"error": "no"}"#, None, true),
            ("lead/lead_1/", 302, "", None, true),
            ("lead/lead_1/", 404, words, Some(NotFound::Record), false),
            ("lead/lead_1/", 404, words, Some(NotFound::NotJson), false),
            ("lead/lead_1/", 404, "<html>", Some(NotFound::Record), true),
            ("lead/lead_1/", 404, "<html>", Some(NotFound::NotJson), false),
            ("lead/lead_1/", 404, r#"{"error": "Not Found"}"#, Some(NotFound::NotJson), true),
        ] {
            let response = Response::with_status(status, body);
            assert_eq!(fault(path, &response, missing).is_some(), is_fault, "{path} {status} {body}");
        }
    }
}
