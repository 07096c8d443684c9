//! Objects held against the CustomResourceDefinition's own schema, as the API server does it, as far as that makes use of
//! OpenAPI. CEL is the API server's alone; [`crate::rules`] are the same rules.

use crate::crd::Version;
use crate::rules::{MOST_FINDINGS, Severity};
use crate::text::{listed, quoted};
use serde_json::{Value, json};

/// Something that the schema does not allow, or drops.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// A refusal, or a warning of what is dropped.
    pub severity: Severity,
    /// The field, as in `spec.networking.ingress[0].from`.
    pub path: String,
    /// The fault of the value, and what would be right.
    pub message: String,
}

/// The schema of a version in a CustomResourceDefinition.
pub fn of(crd: &Value, version: Version) -> Option<&Value> {
    let versions = crd.pointer("/spec/versions")?.as_array()?;
    versions
        .iter()
        .find(|each| each.get("name") == Some(&json!(version.name())))?
        .pointer("/schema/openAPIV3Schema")
}

/// The faults of an object, at most [`MOST_FINDINGS`]. A member that is null counts as absent.
pub fn faults(schema: &Value, object: &Value) -> Vec<Fault> {
    let mut faults = Faults(Vec::new());
    faults.validate(schema, object, "");
    faults.0
}

struct Faults(Vec<Fault>);

impl Faults {
    fn deny(&mut self, path: &str, message: String) {
        self.add(Severity::Deny, path, message);
    }

    fn add(&mut self, severity: Severity, path: &str, message: String) {
        if self.0.len() < MOST_FINDINGS {
            self.0.push(Fault { severity, path: path.to_owned(), message });
        }
    }

    fn validate(&mut self, schema: &Value, value: &Value, path: &str) {
        let kind = schema.get("type").and_then(Value::as_str).unwrap_or_default();
        let either = schema.get("x-kubernetes-int-or-string") == Some(&Value::Bool(true));
        let fits = match value {
            _ if either => value.is_i64() || value.is_u64() || value.is_string(),
            _ => match kind {
                "object" => value.is_object(),
                "array" => value.is_array(),
                "string" => value.is_string(),
                "boolean" => value.is_boolean(),
                "integer" => value.is_i64() || value.is_u64(),
                _ => true,
            },
        };
        if !fits {
            let wanted = if either { "a number or a text" } else { kind };
            return self.deny(path, format!("must be {wanted}, is {}", describe(value)));
        }
        match value {
            Value::String(text) => self.text(schema, text, path),
            Value::Array(items) => self.list(schema, items, path),
            Value::Number(number) => {
                let bound = |key| schema.get(key).and_then(Value::as_f64);
                let number = number.as_f64().unwrap_or_default();
                if let Some(least) = bound("minimum").filter(|least| number < *least) {
                    self.deny(path, format!("is {number}, must be at least {least}"));
                }
                if let Some(most) = bound("maximum").filter(|most| number > *most) {
                    self.deny(path, format!("is {number}, must be at most {most}"));
                }
            }
            Value::Object(members) => self.object(schema, members, path),
            Value::Null | Value::Bool(_) => {}
        }
    }

    fn text(&mut self, schema: &Value, text: &str, path: &str) {
        let words = schema.get("enum").and_then(Value::as_array);
        if let Some(words) = words.filter(|words| !words.iter().any(|word| word == text)) {
            let words = listed(words.iter().filter_map(Value::as_str), MOST_FINDINGS);
            self.deny(path, format!("is {}, must be one of {words}", quoted(text)));
        }
        let length = text.chars().count();
        if limit(schema, "maxLength").is_some_and(|most| length > most) {
            self.deny(path, format!("has {length} characters, too many"));
        }
        if limit(schema, "minLength").is_some_and(|least| length < least) {
            self.deny(path, "must not be empty".to_owned());
        }
    }

    fn list(&mut self, schema: &Value, items: &[Value], path: &str) {
        if let Some(most) = limit(schema, "maxItems").filter(|most| items.len() > *most) {
            return self.deny(path, format!("has {} items, at most {most} are allowed", items.len()));
        }
        let Some(schema) = schema.get("items") else { return };
        for (index, item) in items.iter().enumerate() {
            if self.0.len() >= MOST_FINDINGS {
                return;
            }
            self.validate(schema, item, &format!("{path}[{index}]"));
        }
    }

    fn object(&mut self, schema: &Value, members: &serde_json::Map<String, Value>, path: &str) {
        let known = schema.get("properties").and_then(Value::as_object);
        let any = schema.get("additionalProperties");
        // What is unknown is dropped before it is counted.
        let counts = |(key, member): &(&String, &Value)| {
            !member.is_null() && (any.is_some() || known.is_none_or(|known| known.contains_key(*key)))
        };
        let present = members.iter().filter(counts).count();
        if limit(schema, "minProperties").is_some_and(|least| present < least) {
            self.deny(path, "must not be empty".to_owned());
        }
        let below = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
        let is_there = |key: &str| members.get(key).is_some_and(|member| !member.is_null());
        let required = schema.get("required").and_then(Value::as_array).into_iter().flatten();
        for key in required.filter_map(Value::as_str).filter(|key| !is_there(key)) {
            self.deny(&below(key), "is required".to_owned());
        }
        for (key, member) in members.iter().filter(|(_, member)| !member.is_null()) {
            match (known.and_then(|known| known.get(key)).or(any), known) {
                (Some(schema), _) => self.validate(schema, member, &below(key)),
                (None, Some(known)) => {
                    let known = listed(known.keys(), MOST_FINDINGS);
                    let message = format!("unknown field, the API server drops it; known are {known}");
                    self.add(Severity::Warn, &below(key), message);
                }
                (None, None) => {}
            }
        }
    }
}

fn limit(schema: &Value, key: &str) -> Option<usize> {
    schema.get(key).and_then(Value::as_u64).and_then(|limit| usize::try_from(limit).ok())
}

/// The type of a value, for a message.
pub fn describe(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crd::crd;

    fn found(object: &Value) -> Vec<(String, Severity)> {
        let crd = crd(Version::V1);
        let found = faults(of(&crd, Version::V1).unwrap(), object);
        found.into_iter().map(|fault| (fault.path, fault.severity)).collect()
    }

    fn binding(networking: Value) -> Value {
        json!({"spec": {"targetGroup": {"name": "web"}, "serviceRef": {"name": "web"}, "networking": networking}})
    }

    #[test]
    fn faults_are_told_with_their_path() {
        assert_eq!(
            found(&binding(json!({"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}]}))),
            []
        );
        let deny = |path: &str| (path.to_owned(), Severity::Deny);
        assert_eq!(found(&binding(json!([]))), [deny("spec.networking")]);
        assert_eq!(found(&binding(json!({"ingress": [{}]}))), [deny("spec.networking.ingress[0].from")]);
        let unknown = binding(json!({"engress": []}));
        assert_eq!(found(&unknown), [("spec.networking.engress".to_owned(), Severity::Warn)]);
    }

    #[test]
    fn what_is_null_is_absent() {
        let nulls = json!({"spec": {"targetGroup": {"name": "web", "assumeRole": null}, "nodeSelector": null,
            "serviceRef": {"name": "web", "port": null}, "networking": {"ingress": null}}});
        assert_eq!(found(&nulls), []);
        assert_eq!(found(&json!({"spec": null})), [("spec".to_owned(), Severity::Deny)]);
    }

    #[test]
    fn a_list_that_is_too_long_is_one_fault_and_any_number_of_faults_are_fifty() {
        let long: Vec<Value> = (0..300_000).map(|_| json!({"from": 5})).collect();
        assert_eq!(found(&binding(json!({"ingress": long}))).len(), 1);
        let many: Vec<Value> = (0..49).map(|_| json!({"from": [5, 5]})).collect();
        assert_eq!(found(&binding(json!({"ingress": many}))).len(), 50);
    }
}
