//! Texts of users in messages, and the forms of names.

use std::borrow::Cow;

/// The most characters of a user's text that a message repeats.
const MOST: usize = 64;
/// Those of them before the gap. The end of an ARN says more than its start.
const BEFORE: usize = 20;

/// A user's text for a message: at most 64 characters, with a gap in the middle of a longer one.
pub fn excerpt(text: &str) -> Cow<'_, str> {
    if text.len() <= MOST {
        return text.into();
    }
    let length = text.chars().count();
    if length <= MOST {
        return text.into();
    }
    let before = text.chars().take(BEFORE);
    let after = text.chars().skip(length.saturating_sub(MOST - BEFORE - 1));
    before.chain(std::iter::once('…')).chain(after).collect::<String>().into()
}

/// [`excerpt`] in quotes, with everything escaped that is not printable.
pub fn quoted(text: &str) -> String {
    format!("{:?}", excerpt(text))
}

/// At most `most` of these, and how many more.
pub fn listed<T: AsRef<str>>(all: impl IntoIterator<Item = T>, most: usize) -> String {
    let mut all = all.into_iter();
    let shown: Vec<String> =
        all.by_ref().take(most).map(|each| excerpt(each.as_ref()).into_owned()).collect();
    match all.count() {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// True for a DNS label (RFC 1123), as names of namespaces and Services are. Services could not start with a digit
/// before Kubernetes 1.36; the API server of the cluster knows.
pub fn is_dns_label(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// True for the name of a target group: 1 to 32 letters, digits and hyphens, none of these at an end.
pub fn is_target_group_name(text: &str) -> bool {
    (1..=32).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_excerpt_has_at_most_64_characters_and_keeps_both_ends() {
        assert_eq!(excerpt("web"), "web");
        let long = format!("start{}end", "ü".repeat(1_000_000));
        let short = excerpt(&long);
        assert_eq!(short.chars().count(), 64);
        assert!(short.starts_with("start") && short.contains('…') && short.ends_with("end"));
        let exact = "ü".repeat(64);
        assert_eq!(excerpt(&exact), exact.as_str());
        assert_eq!(quoted("a\nb"), "\"a\\nb\"");
    }

    #[test]
    fn a_list_says_how_many_it_leaves_out() {
        assert_eq!(listed(["a", "b"], 3), "a, b");
        assert_eq!(listed(["a", "b", "c", "d", "e"], 3), "a, b, c and 2 more");
        assert_eq!(listed([""; 0], 3), "");
    }

    #[test]
    fn names_have_their_forms() {
        assert!(is_dns_label("web") && is_dns_label("a-1") && is_dns_label(&"a".repeat(63)));
        for wrong in ["", "-a", "a-", "Web", "web.a", "web?watch=true", "../x", "web#f", "w b", "wéb"] {
            assert!(!is_dns_label(wrong), "{wrong}");
        }
        assert!(!is_dns_label(&"a".repeat(64)));
        assert!(is_target_group_name("Web-1") && !is_target_group_name("web.1"));
        assert!(
            !is_target_group_name("")
                && !is_target_group_name(&"a".repeat(33))
                && !is_target_group_name("-a")
        );
    }
}
