//! The query protocol: form parameters in, XML out, and errors as AWS words them.

use std::borrow::Cow;
use std::fmt::{Display, Write};

/// The parameters of one request as a tree: `Targets.member.1.Id` is the child `Id` of the child `1` and so on.
#[derive(Debug, Default, Clone)]
pub struct Params {
    value: Option<String>,
    children: Vec<(String, Params)>,
}

/// Keys nest no deeper than this; what lies below is one name.
const DEPTH: usize = 10;

impl Params {
    /// Reads `application/x-www-form-urlencoded` text; it can't fail, unknown bytes become U+FFFD.
    #[must_use]
    pub fn parse(body: &[u8]) -> Self {
        let mut root = Self::default();
        for (key, value) in form_urlencoded::parse(body) {
            let mut node = &mut root;
            for part in key.splitn(DEPTH, '.') {
                let at = match node.children.iter().rposition(|(name, _)| name == part) {
                    Some(at) => at,
                    None => {
                        node.children.push((part.to_owned(), Self::default()));
                        node.children.len() - 1
                    }
                };
                match node.children.get_mut(at) {
                    Some((_, child)) => node = child,
                    None => break,
                }
            }
            node.value = Some(value.into_owned());
        }
        root
    }

    /// The text of a parameter, empty included.
    #[must_use]
    pub fn raw(&self, name: &str) -> Option<&str> {
        self.child(name)?.value.as_deref()
    }

    /// The text of a parameter that isn't empty.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.raw(name).filter(|v| !v.is_empty())
    }

    /// A parameter that has to be there.
    ///
    /// # Errors
    /// `MissingParameter`.
    pub fn need(&self, name: &str) -> Result<&str, AwsError> {
        self.get(name).ok_or_else(|| AwsError::missing(name))
    }

    /// A number.
    ///
    /// # Errors
    /// `ValidationError` if it is none.
    pub fn number(&self, name: &str) -> Result<Option<i64>, AwsError> {
        match self.get(name) {
            None => Ok(None),
            Some(v) => v
                .parse()
                .map(Some)
                .map_err(|_| AwsError::validation(format!("'{v}' is not a valid integer for '{name}'"))),
        }
    }

    /// The value of this node itself, as in a list of texts.
    #[must_use]
    pub fn value(&self) -> Option<&str> {
        self.value.as_deref()
    }

    /// A nested structure.
    #[must_use]
    pub fn child(&self, name: &str) -> Option<&Self> {
        self.children.iter().find(|(n, _)| n == name).map(|(_, c)| c)
    }

    /// The elements of `name.member.N` or `name.N` in the order of N.
    #[must_use]
    pub fn list(&self, name: &str) -> Vec<&Self> {
        let Some(list) = self.child(name) else { return Vec::new() };
        let list = list.child("member").unwrap_or(list);
        let mut items: Vec<(u32, &Self)> =
            list.children.iter().filter_map(|(n, c)| n.parse().ok().map(|n| (n, c))).collect();
        items.sort_by_key(|(n, _)| *n);
        items.into_iter().map(|(_, c)| c).collect()
    }

    /// Writes the parameters as elements, as answers repeat them.
    pub fn echo(&self, x: &mut Xml) {
        match &self.value {
            Some(text) => x.escape(text),
            None => {
                for (name, child) in &self.children {
                    // `Values.member.1` is an element `member` in an element `Values`
                    match name.as_str() {
                        "member" => child.echo(x),
                        number if number.parse::<u32>().is_ok() => x.el("member", |x| child.echo(x)),
                        name => x.el(name, |x| child.echo(x)),
                    }
                }
            }
        }
    }

    /// A list of texts.
    #[must_use]
    pub fn strings(&self, name: &str) -> Vec<&str> {
        self.list(name).into_iter().filter_map(Self::value).collect()
    }
}

/// An answer that isn't a success.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AwsError {
    /// The HTTP status.
    pub status: u16,
    /// The code that clients match.
    pub code: Cow<'static, str>,
    /// The text.
    pub message: String,
}

impl AwsError {
    /// Any code with HTTP 400.
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { status: 400, code: code.into(), message: message.into() }
    }

    /// Any code with any status.
    pub fn with_status(status: u16, code: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self { status, code: code.into(), message: message.into() }
    }

    /// `ValidationError`, the workhorse of ELBv2.
    pub fn validation(message: impl Into<String>) -> Self {
        Self::new("ValidationError", message)
    }

    /// `MissingParameter`.
    #[must_use]
    pub fn missing(name: &str) -> Self {
        Self::new("MissingParameter", format!("The request must contain the parameter {name}"))
    }

    /// `InvalidParameterValue`.
    pub fn value(message: impl Into<String>) -> Self {
        Self::new("InvalidParameterValue", message)
    }

    /// The body of the answer in the way of the service.
    #[must_use]
    pub fn body(&self, service: Service, request_id: &str) -> String {
        let mut x = Xml::default();
        match service {
            Service::Ec2 => x.el("Response", |x| {
                x.el("Errors", |x| {
                    x.el("Error", |x| {
                        x.text("Code", &self.code);
                        x.text("Message", &self.message);
                    });
                });
                x.text("RequestID", request_id);
            }),
            Service::Elb | Service::Sts => x.el_ns("ErrorResponse", service.namespace(), |x| {
                x.el("Error", |x| {
                    x.text("Type", if self.status < 500 { "Sender" } else { "Receiver" });
                    x.text("Code", &self.code);
                    x.text("Message", &self.message);
                });
                x.text("RequestId", request_id);
            }),
        }
        x.finish()
    }
}

/// The services.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Service {
    /// Elastic Load Balancing, version 2015-12-01.
    #[serde(alias = "elasticloadbalancing", alias = "elbv2")]
    Elb,
    /// EC2, version 2016-11-15.
    Ec2,
    /// Security Token Service, version 2011-06-15.
    Sts,
}

impl Service {
    /// By the name in the scope of a signature.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        match name {
            "elasticloadbalancing" => Some(Self::Elb),
            "ec2" => Some(Self::Ec2),
            "sts" => Some(Self::Sts),
            _ => None,
        }
    }

    /// The name in signatures and in IAM actions.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Elb => "elasticloadbalancing",
            Self::Ec2 => "ec2",
            Self::Sts => "sts",
        }
    }

    /// The API version that a request has to name.
    #[must_use]
    pub fn version(self) -> &'static str {
        match self {
            Self::Elb => "2015-12-01",
            Self::Ec2 => "2016-11-15",
            Self::Sts => "2011-06-15",
        }
    }

    fn namespace(self) -> &'static str {
        match self {
            Self::Elb => "http://elasticloadbalancing.amazonaws.com/doc/2015-12-01/",
            Self::Ec2 => "http://ec2.amazonaws.com/doc/2016-11-15/",
            Self::Sts => "https://sts.amazonaws.com/doc/2011-06-15/",
        }
    }

    /// Wraps the inside of an answer.
    #[must_use]
    pub fn answer(self, action: &str, request_id: &str, inside: &Xml) -> String {
        let mut x = Xml { out: String::with_capacity(inside.out.len() + 400) };
        x.el_ns(&format!("{action}Response"), self.namespace(), |x| match self {
            Self::Ec2 => {
                x.text("requestId", request_id);
                x.out.push_str(&inside.out);
            }
            Self::Elb | Self::Sts => {
                x.el(&format!("{action}Result"), |x| x.out.push_str(&inside.out));
                x.el("ResponseMetadata", |x| x.text("RequestId", request_id));
            }
        });
        x.finish()
    }
}

/// XML, written front to back.
#[derive(Debug, Default, Clone)]
pub struct Xml {
    out: String,
}

impl Xml {
    /// An element with what `inside` writes.
    pub fn el(&mut self, name: &str, inside: impl FnOnce(&mut Self)) {
        self.out.push('<');
        self.out.push_str(name);
        self.out.push('>');
        inside(self);
        self.out.push_str("</");
        self.out.push_str(name);
        self.out.push('>');
    }

    fn el_ns(&mut self, name: &str, namespace: &str, inside: impl FnOnce(&mut Self)) {
        self.out.push('<');
        self.out.push_str(name);
        self.out.push_str(" xmlns=\"");
        self.out.push_str(namespace);
        self.out.push_str("\">");
        inside(self);
        self.out.push_str("</");
        self.out.push_str(name);
        self.out.push('>');
    }

    /// An element with text, escaped.
    pub fn text(&mut self, name: &str, text: &str) {
        self.el(name, |x| x.escape(text));
    }

    /// An element with a number or another plain value.
    pub fn val(&mut self, name: &str, value: impl Display) {
        self.el(name, |x| {
            // writing into a String can't fail
            let _ = write!(x.out, "{value}");
        });
    }

    /// An element if there is a text.
    pub fn opt(&mut self, name: &str, text: Option<&str>) {
        if let Some(text) = text {
            self.text(name, text);
        }
    }

    /// A list: `name` around one `item` per element.
    pub fn each<T>(
        &mut self,
        name: &str,
        item: &str,
        items: impl IntoIterator<Item = T>,
        mut inside: impl FnMut(&mut Self, T),
    ) {
        self.el(name, |x| {
            for element in items {
                x.el(item, |x| inside(x, element));
            }
        });
    }

    /// What was written elsewhere.
    pub fn push(&mut self, other: Self) {
        self.out.push_str(&other.out);
    }

    /// The text so far.
    #[must_use]
    pub fn finish(self) -> String {
        self.out
    }

    /// Text alone, escaped.
    pub fn escape(&mut self, text: &str) {
        if !text.bytes().any(|b| matches!(b, b'<' | b'>' | b'&' | b'"' | 0..=0x1f)) {
            self.out.push_str(text);
            return;
        }
        for c in text.chars() {
            match c {
                '<' => self.out.push_str("&lt;"),
                '>' => self.out.push_str("&gt;"),
                '&' => self.out.push_str("&amp;"),
                '"' => self.out.push_str("&quot;"),
                '\n' => self.out.push_str("&#xA;"),
                '\r' => self.out.push_str("&#xD;"),
                '\t' => self.out.push_str("&#x9;"),
                c if c < ' ' => self.out.push('\u{fffd}'),
                c => self.out.push(c),
            }
        }
    }
}

/// `*` and `?` wildcards as in EC2 filters.
#[must_use]
pub(crate) fn glob(pattern: &str, text: &str) -> bool {
    let (p, t): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut i, mut j, mut star, mut mark) = (0, 0, None, 0);
    while j < t.len() {
        if p.get(i) == Some(&'*') {
            star = Some(i);
            mark = j;
            i += 1;
        } else if i < p.len() && (p.get(i) == Some(&'?') || p.get(i) == t.get(j)) {
            i += 1;
            j += 1;
        } else if let Some(s) = star {
            i = s + 1;
            mark += 1;
            j = mark;
        } else {
            return false;
        }
    }
    p.iter().skip(i).all(|c| *c == '*')
}

/// The time of a number of milliseconds since the epoch as AWS writes it.
#[must_use]
pub(crate) fn timestamp(ms: u64) -> String {
    jiff::Timestamp::from_millisecond(i64::try_from(ms).unwrap_or(i64::MAX))
        .map(|t| t.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
        .unwrap_or_default()
}
