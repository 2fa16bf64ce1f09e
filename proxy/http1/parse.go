package http1

import (
	"bytes"
	"slices"
	"strconv"
	"strings"

	"github.com/hanse-mesh/hanse/proxy/message"
)

// Reject is why bytes are not acceptable, and what a server answers to them.
type Reject struct {
	Status int    // 0: nothing, the connection ends
	Reason string // a constant, for a counter's label
}

// Error implements error.
func (r *Reject) Error() string { return "http1: " + r.Reason + " (" + strconv.Itoa(r.Status) + ")" }

func bad(reason string) *Reject { return &Reject{400, reason} }

// addedFields is how many fields a head has room for besides its own.
const addedFields = 4

const (
	maxRequestLine = 16 << 10
	maxVersionLine = 4 << 10 // of a response
)

// head is what a head says beside the Request or Response.
type head struct {
	minor     byte // of HTTP/1.x
	chunked   bool
	hasLength bool
	length    int64
	close     bool
	keepAlive bool
	upgrade   string // what Upgrade names, where Connection says so
	upgrading bool   // Connection names upgrade
	expect    bool   // 100-continue
	host      string
	hosts     int
	fields    message.Fields
	drop      []string // what Connection names besides
	status    int
}

// headEnd returns the length of a head with its empty line, 0 if it is not whole. from is where the search may begin.
func headEnd(b []byte, from int) int {
	if i := bytes.Index(b[max(0, from-3):], crlfcrlf); i >= 0 {
		return max(0, from-3) + i + 4
	}
	return 0
}

var crlfcrlf = []byte("\r\n\r\n")

// lineClass tells bytes apart that must not be in field values or lines: controls but HTAB.
func badValueByte(c byte) bool { return c < ' ' && c != '\t' || c == 0x7f }

var tokenBytes = func() (t [256]bool) {
	for c := byte('!'); c <= '~'; c++ {
		t[c] = strings.IndexByte("\"(),/:;<=>?@[\\]{}", c) < 0
	}
	return t
}()

func isToken(s string) bool {
	for i := range len(s) {
		if !tokenBytes[s[i]] {
			return false
		}
	}
	return s != ""
}

// lower makes the field names of a head lower case, in place, so that one string holds the head as it is used.
func lower(b []byte) {
	for len(b) > 0 {
		i := 0
		for ; i < len(b) && b[i] != ':' && b[i] != '\n'; i++ {
			if c := b[i]; c >= 'A' && c <= 'Z' {
				b[i] = c | 0x20
			}
		}
		n := bytes.IndexByte(b[i:], '\n')
		if n < 0 {
			return
		}
		b = b[i+n+1:]
	}
}

// parseFields reads field lines, each ended by CRLF, up to the end of s. Names are lower case already.
func (h *head) parseFields(s string, request bool, maxFields int) *Reject {
	lines := 0
	for len(s) > 0 {
		end := strings.IndexByte(s, '\r')
		if end < 0 || end+1 >= len(s) || s[end+1] != '\n' {
			return bad("bare_cr")
		}
		line := s[:end]
		s = s[end+2:]
		if lines++; lines > maxFields {
			return &Reject{431, "too_many_fields"}
		}
		colon := strings.IndexByte(line, ':')
		switch {
		case line == "":
			return bad("empty_line")
		case line[0] == ' ' || line[0] == '\t':
			return bad("folded_line")
		case colon < 0:
			return bad("no_colon")
		case colon == 0:
			return bad("empty_name")
		case line[colon-1] == ' ' || line[colon-1] == '\t':
			return bad("space_before_colon")
		}
		name, value := line[:colon], trim(line[colon+1:])
		if !isToken(name) {
			return bad("field_name")
		}
		for i := range len(value) {
			if badValueByte(value[i]) {
				if value[i] == '\n' {
					return bad("bare_lf")
				}
				return bad("field_value")
			}
		}
		if r := h.field(name, value, request); r != nil {
			return r
		}
	}
	for _, name := range h.drop {
		h.fields.Del(name)
	}
	return nil
}

func trim(s string) string {
	for s != "" && (s[0] == ' ' || s[0] == '\t') {
		s = s[1:]
	}
	for s != "" && (s[len(s)-1] == ' ' || s[len(s)-1] == '\t') {
		s = s[:len(s)-1]
	}
	return s
}

// field keeps what is end to end, and understands what is not.
func (h *head) field(name, value string, request bool) *Reject {
	switch name {
	case "content-length":
		if h.hasLength {
			return bad("two_lengths")
		}
		n, err := strconv.ParseUint(value, 10, 63)
		if err != nil || value[0] < '0' || value[0] > '9' {
			return bad("content_length")
		}
		h.hasLength, h.length = true, int64(n)
		return nil
	case "transfer-encoding":
		switch {
		case h.chunked:
			return bad("two_transfer_encodings")
		case !strings.EqualFold(value, "chunked"):
			return &Reject{501, "transfer_encoding"}
		}
		h.chunked = true
		return nil
	case "host":
		h.hosts++
		h.host = value
		return nil
	case "connection":
		for name := range strings.SplitSeq(value, ",") {
			switch name = strings.ToLower(trim(name)); name {
			case "":
			case "close":
				h.close = true
			case "keep-alive":
				h.keepAlive = true
			case "upgrade":
				h.upgrading = true
			case "te", "transfer-encoding", "content-length", "host", "trailer", "cookie", "authorization":
				// Read by others too, or never meant for one connection only: not to be removed by a caller's word.
			default:
				h.drop = append(h.drop, name)
			}
		}
		return nil
	case "upgrade":
		if h.upgrade != "" {
			return bad("two_upgrades")
		}
		h.upgrade = value
		return nil
	case "keep-alive", "proxy-connection", "http2-settings", "proxy-authenticate", "proxy-authorization":
		return nil
	case "te":
		for coding := range strings.SplitSeq(value, ",") {
			if strings.EqualFold(trim(coding), "trailers") {
				if _, ok := h.fields.Get("te"); !ok {
					h.fields.Add("te", "trailers")
				}
			}
		}
		return nil
	case "expect":
		if !request {
			return nil
		}
		if !strings.EqualFold(value, "100-continue") {
			return &Reject{417, "expect"}
		}
		h.expect = true
		return nil
	}
	h.fields = append(h.fields, message.Field{Name: name, Value: value})
	return nil
}

// framing checks what delimits a message (RFC 9112 §6.3): whoever says it twice is not believed once.
func (h *head) framing() *Reject {
	switch {
	case h.chunked && h.hasLength:
		return bad("length_and_chunked")
	case h.chunked && h.minor == 0:
		return bad("chunked_in_1_0")
	}
	return nil
}

// parseRequest reads a whole head, which it changes. fields is reused.
func parseRequest(b []byte, r *message.Request, h *head, maxFields int) *Reject {
	eol := bytes.IndexByte(b, '\n')
	if eol > maxRequestLine {
		return &Reject{414, "request_line_too_long"}
	}
	if eol < 1 || b[eol-1] != '\r' {
		return bad("bare_lf")
	}
	lower(b[eol+1:])
	s := string(b)
	fields := h.fields[:0]
	*h = head{fields: fields, drop: h.drop[:0]}
	method, rest, ok := strings.Cut(s[:eol-1], " ")
	target, version, ok2 := strings.Cut(rest, " ")
	switch {
	case !ok || !ok2 || target == "":
		return bad("request_line")
	case !isToken(method):
		return bad("method")
	case version != "HTTP/1.1" && version != "HTTP/1.0":
		if len(version) == 8 && strings.HasPrefix(version, "HTTP/") && version[5] >= '0' && version[5] <= '9' && version[6] == '.' && version[7] >= '0' && version[7] <= '9' {
			return &Reject{505, "version"}
		}
		if !knownMethod(method) {
			return notHTTP
		}
		return bad("request_line")
	}
	for i := range len(target) {
		if c := target[i]; c <= ' ' || c >= 0x7f || c == '#' || c == '"' || c == '<' || c == '>' || c == '\\' || c == '^' || c == '`' {
			return bad("target")
		}
	}
	h.minor = version[7] - '0'
	if e := h.parseFields(s[eol+1:len(s)-2], true, maxFields); e != nil {
		return e
	}
	if e := h.framing(); e != nil {
		return e
	}
	h.fields = slices.Grow(h.fields, addedFields)
	*r = message.Request{Method: method, Scheme: "http", Fields: h.fields}
	if e := h.target(r, target); e != nil {
		return e
	}
	switch {
	case h.chunked:
		r.Length = message.Unknown
	default:
		r.Length = h.length
	}
	if method == "CONNECT" {
		if h.chunked || h.length > 0 {
			return bad("connect_with_body")
		}
		r.Length = message.Unknown
		return nil
	}
	if h.upgrading && h.upgrade != "" && h.minor == 1 && method == "GET" && r.Length == 0 && isToken(h.upgrade) && !strings.EqualFold(h.upgrade, "h2c") {
		r.Protocol, r.Length = strings.ToLower(h.upgrade), message.Unknown
	}
	return nil
}

// target finds out what is asked of whom (RFC 9112 §3.2).
func (h *head) target(r *message.Request, target string) *Reject {
	switch {
	case h.hosts > 1:
		return bad("two_hosts")
	case h.hosts == 0 && h.minor == 1:
		return bad("no_host")
	case !authority(h.host):
		return bad("host")
	}
	if r.Method == "CONNECT" {
		host, port, ok := cutLast(target, ':')
		if n, err := strconv.ParseUint(port, 10, 16); !ok || host == "" || err != nil || n == 0 || !authority(target) {
			return bad("target")
		}
		r.Scheme, r.Authority = "", target
		return nil
	}
	switch {
	case target == "*":
		if r.Method != "OPTIONS" {
			return bad("target")
		}
		r.Path, r.Authority = "*", h.host
	case target[0] == '/':
		r.Path, r.Authority = target, h.host
	default:
		rest, ok := cutPrefixFold(target, "http://")
		if !ok {
			if rest, ok = cutPrefixFold(target, "https://"); !ok {
				return bad("target")
			}
			r.Scheme = "https"
		}
		i := strings.IndexAny(rest, "/?")
		if i < 0 {
			i = len(rest)
		}
		r.Authority, r.Path = rest[:i], rest[i:]
		switch {
		case r.Authority == "" || !authority(r.Authority):
			return bad("target")
		case h.hosts == 1 && !strings.EqualFold(h.host, r.Authority):
			return bad("host_against_target")
		case r.Path == "":
			r.Path = "/"
			if r.Method == "OPTIONS" {
				r.Path = "*"
			}
		case r.Path[0] == '?':
			r.Path = "/" + r.Path
		}
	}
	return nil
}

// notHTTP refuses what is another protocol: an answer in HTTP would make no sense to it, so that there is none.
var notHTTP = &Reject{0, "not_http"}

func knownMethod(m string) bool {
	switch m {
	case "GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH":
		return true
	}
	return false
}

func cutLast(s string, sep byte) (before, after string, ok bool) {
	i := strings.LastIndexByte(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+1:], true
}

func cutPrefixFold(s, prefix string) (string, bool) {
	if len(s) < len(prefix) || !strings.EqualFold(s[:len(prefix)], prefix) {
		return "", false
	}
	return s[len(prefix):], true
}

// authority holds for host and port without userinfo, in which no reader can see something else.
func authority(s string) bool {
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c >= 0x7f || strings.IndexByte("@/\\?#<>\"^`{|},", c) >= 0 {
			return false
		}
	}
	return true
}

// parseResponse reads a whole head, which it changes.
func parseResponse(b []byte, r *message.Response, h *head, maxFields int) *Reject {
	eol := bytes.IndexByte(b, '\n')
	if eol < 1 || b[eol-1] != '\r' || eol > maxVersionLine {
		return bad("status_line")
	}
	lower(b[eol+1:])
	s := string(b)
	*h = head{fields: h.fields[:0], drop: h.drop[:0]}
	line := s[:eol-1] // HTTP/1.1 200 Words
	if len(line) < 12 || line[:7] != "HTTP/1." || line[7] != '0' && line[7] != '1' || line[8] != ' ' || len(line) > 12 && line[12] != ' ' {
		return bad("status_line")
	}
	for i := range len(line) {
		if badValueByte(line[i]) {
			return bad("status_line")
		}
	}
	h.minor = line[7] - '0'
	status, err := strconv.ParseUint(line[9:12], 10, 16)
	if err != nil || status < 100 {
		return bad("status_line")
	}
	if e := h.parseFields(s[eol+1:len(s)-2], false, maxFields); e != nil {
		return e
	}
	if e := h.framing(); e != nil {
		return e
	}
	h.status = int(status)
	*r = message.Response{Status: int(status), Fields: h.fields, Length: message.Unknown}
	if h.hasLength {
		r.Length = h.length
	}
	return nil
}

// parseTrailers reads the field lines after the last chunk, with their empty line.
func parseTrailers(b []byte, maxFields int) (message.Fields, *Reject) {
	lower(b)
	var h head
	if e := h.parseFields(string(b[:len(b)-2]), true, maxFields); e != nil {
		return nil, e
	}
	if h.hasLength || h.chunked || h.hosts > 0 || h.upgrade != "" || h.expect || h.close || h.keepAlive || h.upgrading || len(h.drop) > 0 {
		return nil, bad("trailer_field")
	}
	for i := range h.fields { // RFC 9110 §6.5.1
		switch h.fields[i].Name {
		case "te", "trailer", "authorization", "cookie", "set-cookie", "content-type", "content-encoding", "content-range", "cache-control", "max-forwards", "range":
			return nil, bad("trailer_field")
		}
	}
	return h.fields, nil
}
