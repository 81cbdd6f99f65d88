//! The forms of error answers. Close's validator nests errors (close-api.md §3), and the bodies of 2026 are pydantic's
//! (§15, 6); the form for nested lists is not known. So refusals are made in the recorded form, and changed here.

use serde_json::{Value, json};

use crate::behaviour::{Behaviour, ErrorShape, ErrorTexts, MissingRecord, UnknownUrl};
use crate::call::{Answer, Payload};
use crate::refusal::{self, Object};

/// The HTML of a proxy or of a server in front of the API.
const PAGE: &str = "<!DOCTYPE html><html><head><title>Error</title></head><body><h1>Error</h1></body></html>";

/// The answer as the behaviour wants it.
pub(crate) fn of(answer: Answer, behaviour: &Behaviour) -> Answer {
    let Payload::Json(body) = &answer.payload else { return answer };
    match answer.status {
        400 => match errors(body) {
            Some(errors) => {
                let (status, body) = refused(errors, behaviour);
                Answer { status, payload: Payload::Json(body), ..answer }
            }
            None => answer,
        },
        404 if is_about_record(body) => match behaviour.missing_record {
            MissingRecord::Words => answer,
            MissingRecord::OtherWords => {
                Answer { payload: Payload::Json(json!({"error": "Not Found"})), ..answer }
            }
            MissingRecord::Html => Answer { payload: Payload::Html(PAGE), ..answer },
        },
        404 => match behaviour.unknown_url {
            UnknownUrl::Json => answer,
            UnknownUrl::Html => Answer { payload: Payload::Html(PAGE), ..answer },
        },
        _ => answer,
    }
}

fn is_about_record(body: &Value) -> bool {
    let text = body["error"].as_str().or_else(|| body["errors"][0].as_str());
    text.is_some_and(|text| text.contains("does not exist"))
}

/// The path and the text of each error. `None` if the answer names no field.
fn errors(body: &Value) -> Option<Vec<(Vec<String>, String)>> {
    let mut errors = Vec::new();
    collect(body.get("field-errors")?, &mut Vec::new(), &mut errors);
    (!errors.is_empty()).then_some(errors)
}

fn collect(node: &Value, path: &mut Vec<String>, into: &mut Vec<(Vec<String>, String)>) {
    match node {
        Value::String(text) => into.push((path.clone(), text.clone())),
        Value::Object(members) => {
            for (name, child) in members {
                let is_wrapper = ["errors", "field-errors"].contains(&name.as_str());
                if !is_wrapper {
                    path.push(name.clone());
                }
                collect(child, path, into);
                if !is_wrapper {
                    path.pop();
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) => {}
    }
}

fn refused(errors: Vec<(Vec<String>, String)>, behaviour: &Behaviour) -> (u16, Value) {
    let errors = errors.into_iter().map(|(path, text)| (path, worded(text, behaviour.error_texts)));
    let mut errors: Vec<_> = errors.collect();
    let first = |errors: &[(Vec<String>, String)]| errors.first().map(|(_, text)| text.clone());
    let body = match behaviour.error_shape {
        ErrorShape::Nested => json!({"errors": [], "field-errors": nested(&errors, true)}),
        ErrorShape::Plain => json!({"errors": [], "field-errors": nested(&errors, false)}),
        ErrorShape::Dotted => {
            let flat: Object = errors.into_iter().map(|(path, text)| (path.join("."), text.into())).collect();
            json!({"errors": [], "field-errors": flat})
        }
        ErrorShape::List => json!({"errors": [first(&errors)]}),
        ErrorShape::General => json!({"error": first(&errors)}),
        ErrorShape::Vague => json!({"error": "The request is not valid."}),
        ErrorShape::Detail => {
            let part = |name: &String| name.parse::<u64>().map_or_else(|_| json!(name), |index| json!(index));
            let detail = errors.drain(..).map(|(path, text)| {
                let location: Vec<Value> =
                    std::iter::once(json!("body")).chain(path.iter().map(part)).collect();
                json!({"type": "value_error", "loc": location, "msg": text})
            });
            return (422, json!({"detail": detail.collect::<Vec<_>>()}));
        }
    };
    (400, body)
}

/// The errors as an object by name; with `wrapped`, each level below the first is wrapped as Close's validator does.
fn nested(errors: &[(Vec<String>, String)], wrapped: bool) -> Object {
    let mut object = Object::new();
    for (path, text) in errors {
        insert(&mut object, path, text, wrapped);
    }
    object
}

/// Names and indices alternate: `contacts`, `0`, `phones`, `0`, `phone`.
fn insert(object: &mut Object, path: &[String], text: &str, wrapped: bool) {
    let Some((name, rest)) = path.split_first() else { return };
    if rest.is_empty() {
        object.insert(name.clone(), text.into());
        return;
    }
    let child = object.entry(name.clone()).or_insert_with(|| json!({}));
    let is_index = name.parse::<u64>().is_ok();
    let inner = match (wrapped, is_index) {
        (false, _) => Some(child),
        (true, false) => {
            child.as_object_mut().map(|child| child.entry("errors").or_insert_with(|| json!({})))
        }
        (true, true) => child.as_object_mut().map(|child| {
            child.entry("errors").or_insert_with(|| json!([]));
            child.entry("field-errors").or_insert_with(|| json!({}))
        }),
    };
    if let Some(inner) = inner.and_then(Value::as_object_mut) {
        insert(inner, rest, text, wrapped);
    }
}

/// The text in the words of another validator.
fn worded(text: String, texts: ErrorTexts) -> String {
    match (texts, text.as_str()) {
        (ErrorTexts::Cleancat, _) => text,
        (ErrorTexts::Pydantic, refusal::REQUIRED) => "Field required".into(),
        (ErrorTexts::Pydantic, refusal::NOT_TEXT) => "Input should be a valid string".into(),
        (ErrorTexts::Pydantic, known) if known.starts_with(refusal::NOT_A_CHOICE) => {
            "Input should be 'one' or 'another'".into()
        }
        (ErrorTexts::Pydantic, known) if known.starts_with("Invalid email") => {
            "value is not a valid email address: An email address must have an @-sign.".into()
        }
        (ErrorTexts::Pydantic, known) if known.starts_with("The Custom Field") => {
            "Extra inputs are not permitted".into()
        }
        (ErrorTexts::Pydantic, known) if known.starts_with("Input should") => text,
        (ErrorTexts::Pydantic, _) => format!("Value error, {text}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PHONE: &str = "Phone number is not valid.";

    fn recorded() -> Value {
        json!({"errors": [], "field-errors": {
            "name": "This field is required.",
            "contacts": {"errors": {"0": {"errors": [], "field-errors": {
                "phones": {"errors": {"1": {"errors": [], "field-errors": {"phone": PHONE}}}}}}}},
        }})
    }

    fn answer(shape: ErrorShape, texts: ErrorTexts) -> (u16, Value) {
        let behaviour = Behaviour { error_shape: shape, error_texts: texts, ..Behaviour::default() };
        let answer = of(Answer::json(400, recorded()), &behaviour);
        let Payload::Json(body) = answer.payload else { panic!("{answer:?}") };
        (answer.status, body)
    }

    #[test]
    fn errors_have_every_shape() {
        let of = |shape| answer(shape, ErrorTexts::Cleancat);
        let required = "This field is required.";
        assert_eq!(of(ErrorShape::Nested), (400, recorded()));
        assert_eq!(
            of(ErrorShape::Plain).1["field-errors"],
            json!({"name": required, "contacts": {"0": {"phones": {"1": {"phone": PHONE}}}}})
        );
        assert_eq!(
            of(ErrorShape::Dotted).1["field-errors"],
            json!({"name": required, "contacts.0.phones.1.phone": PHONE})
        );
        let first = of(ErrorShape::General).1["error"].clone();
        assert!([required, PHONE].contains(&first.as_str().unwrap()), "{first}");
        assert_eq!(of(ErrorShape::List).1, json!({"errors": [first]}));
        assert_eq!(of(ErrorShape::Vague).1, json!({"error": "The request is not valid."}));
        let (status, detail) = of(ErrorShape::Detail);
        let errors = detail["detail"].as_array().unwrap();
        let phone = json!(["body", "contacts", 0, "phones", 1, "phone"]);
        assert!(status == 422 && errors.iter().any(|error| error["loc"] == phone), "{detail}");
    }

    #[test]
    fn errors_have_the_texts_of_either_validator() {
        let (_, body) = answer(ErrorShape::Dotted, ErrorTexts::Pydantic);
        assert_eq!(
            body["field-errors"],
            json!({"name": "Field required", "contacts.0.phones.1.phone": format!("Value error, {PHONE}")})
        );
    }

    #[test]
    fn a_404_has_closes_words_or_others() {
        let behaviour = Behaviour {
            missing_record: MissingRecord::Html,
            unknown_url: UnknownUrl::Html,
            ..Behaviour::default()
        };
        let record = Answer::error(404, "Empty query: Lead matching query does not exist.");
        let url = Answer::error(404, "The requested URL was not found on the server.");
        for (answer, behaviour, is_html) in [
            (&record, &Behaviour::default(), false),
            (&url, &Behaviour::default(), false),
            (&record, &behaviour, true),
            (&url, &behaviour, true),
            (&url, &Behaviour { missing_record: MissingRecord::Html, ..Behaviour::default() }, false),
        ] {
            let html = matches!(of(answer.clone(), behaviour).payload, Payload::Html(_));
            assert_eq!(html, is_html, "{answer:?} {behaviour:?}");
        }
    }
}
