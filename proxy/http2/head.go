package http2

import (
	"strconv"
	"strings"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/hanse-mesh/hanse/proxy/message"
)

// headReader gathers one head or trailers. The connection's reader owns it.
type headReader struct {
	limit  uint32
	client bool

	stream    uint32 // whose CONTINUATION is awaited; 0: none
	end       bool   // END_STREAM
	selfish   bool   // depends on itself
	frames    int
	encoded   int
	fields    []message.Field
	size      uint32
	tooLarge  bool
	malformed string // a constant: what is wrong
	pseudo    pseudo
	regular   bool // a field that is no pseudo-header came
	length    int64
	host      string
	hosts     int
	cookie    int // index of its field + 1
}

// pseudo are the pseudo-header fields; has tells empty ones from none.
type pseudo struct {
	method, scheme, authority, path, protocol, status string
	has                                               uint8
}

const (
	hasMethod = 1 << iota
	hasScheme
	hasAuthority
	hasPath
	hasProtocol
	hasStatus
)

func (h *headReader) init(dec *hpack.Decoder, limit uint32, client bool) {
	h.limit, h.client = limit, client
	dec.SetEmitFunc(func(f hpack.HeaderField) { h.field(dec, f) })
}

func (h *headReader) begin(dec *hpack.Decoder, id uint32, end bool) {
	clear(h.fields)
	*h = headReader{limit: h.limit, client: h.client, stream: id, end: end, fields: h.fields[:0], length: message.Unknown}
	dec.SetEmitEnabled(true)
}

func (h *headReader) bad(reason string) {
	if h.malformed == "" {
		h.malformed = reason
	}
}

// field is called for each field line (RFC 9113 §8.2, §8.3).
func (h *headReader) field(dec *hpack.Decoder, f hpack.HeaderField) {
	if h.size += f.Size(); h.size > h.limit {
		h.tooLarge = true
		dec.SetEmitEnabled(false)
		return
	}
	if !validValue(f.Value) {
		h.bad("field_value")
		return
	}
	if strings.HasPrefix(f.Name, ":") {
		h.pseudoField(f)
		return
	}
	h.regular = true
	if !validName(f.Name) {
		h.bad("field_name")
		return
	}
	switch f.Name {
	case "connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade":
		h.bad("connection_field")
	case "te":
		if f.Value != "trailers" {
			h.bad("te")
		}
	case "content-length":
		n, err := strconv.ParseUint(f.Value, 10, 63)
		if err != nil || !digits(f.Value) || h.length >= 0 && h.length != int64(n) {
			h.bad("content_length")
			return
		}
		h.length = int64(n)
		return
	case "host":
		h.hosts++
		h.host = f.Value
		return
	case "expect":
		return // 100 (Continue) is each hop's own; nothing is lost by sending at once
	case "cookie": // RFC 9113 §8.2.3
		if h.cookie > 0 {
			c := &h.fields[h.cookie-1]
			c.Value += "; " + f.Value
			return
		}
		h.cookie = len(h.fields) + 1
	}
	h.fields = append(h.fields, message.Field{Name: f.Name, Value: f.Value})
}

func (h *headReader) pseudoField(f hpack.HeaderField) {
	if h.regular {
		h.bad("pseudo_order")
		return
	}
	var to *string
	var bit uint8
	p := &h.pseudo
	switch {
	case h.client && f.Name == ":status":
		to, bit = &p.status, hasStatus
	case h.client:
	case f.Name == ":method":
		to, bit = &p.method, hasMethod
	case f.Name == ":scheme":
		to, bit = &p.scheme, hasScheme
	case f.Name == ":authority":
		to, bit = &p.authority, hasAuthority
	case f.Name == ":path":
		to, bit = &p.path, hasPath
	case f.Name == ":protocol":
		to, bit = &p.protocol, hasProtocol
	}
	if to == nil || p.has&bit != 0 {
		h.bad("pseudo_field")
		return
	}
	p.has |= bit
	*to = f.Value
}

// request makes a Request of what has come (RFC 9113 §8.3.1, RFC 8441 §4). Its fields are appended to space.
func (h *headReader) request(r *message.Request, space []message.Field) {
	p := &h.pseudo
	*r = message.Request{Method: p.method, Scheme: p.scheme, Authority: p.authority, Path: p.path, Protocol: p.protocol, Length: h.length}
	connect := p.method == "CONNECT" && p.has&hasProtocol == 0
	switch {
	case !validToken(p.method):
		h.bad("method")
	case connect && (p.has&(hasScheme|hasPath) != 0 || p.authority == ""):
		h.bad("connect")
	case !connect && (p.scheme == "" || p.path == ""):
		h.bad("pseudo_missing")
	case p.has&hasProtocol != 0 && (p.method != "CONNECT" || p.protocol == ""):
		h.bad("protocol")
	case !connect && p.path[0] != '/' && (p.path != "*" || p.method != "OPTIONS"), strings.ContainsAny(p.path, " #"):
		h.bad("path")
	case h.hosts > 1, h.hosts == 1 && p.has&hasAuthority != 0 && !strings.EqualFold(h.host, p.authority):
		h.bad("host")
	}
	if p.has&hasAuthority == 0 {
		r.Authority = h.host
	}
	if !validAuthority(r.Authority) {
		h.bad("authority")
	}
	switch {
	case p.has&hasProtocol != 0:
		r.Method, r.Length = "GET", message.Unknown
	case connect:
		r.Length = message.Unknown
	case h.end && h.length > 0:
		h.bad("content_length")
	case h.end:
		r.Length = 0
	}
	r.Fields = append(space, h.fields...)
}

// response makes a Response of what has come. Its fields are appended to space.
func (h *headReader) response(r *message.Response, space []message.Field) {
	p := &h.pseudo
	*r = message.Response{Length: h.length, Fields: append(space, h.fields...)}
	if len(p.status) != 3 || !digits(p.status) || p.status[0] == '0' {
		h.bad("status")
		return
	}
	r.Status, _ = strconv.Atoi(p.status)
	if r.Status == 101 {
		h.bad("status")
	}
}

func (h *headReader) trailers() message.Fields {
	if h.pseudo.has != 0 {
		h.bad("pseudo_field")
	}
	if h.length >= 0 || h.hosts > 0 {
		h.bad("trailer_field")
	}
	return append(message.Fields(nil), h.fields...)
}

// headFrame takes in HEADERS.
func (c *conn) headFrame(id uint32, block []byte, end, complete, selfish bool) error {
	h := &c.head
	h.begin(c.dec, id, end)
	h.selfish = selfish
	return c.fragment(block, complete)
}

func (c *conn) continuation(f *xhttp2.ContinuationFrame) error {
	if c.head.frames++; c.head.frames > headFrames {
		return &connError{xhttp2.ErrCodeEnhanceYourCalm, "flood of CONTINUATION"}
	}
	return c.fragment(f.HeaderBlockFragment(), f.HeadersEnded())
}

func (c *conn) fragment(block []byte, complete bool) error {
	h := &c.head
	if h.encoded += len(block); h.encoded > 4*int(h.limit) {
		return &connError{xhttp2.ErrCodeEnhanceYourCalm, "head far too large"}
	}
	if _, err := c.dec.Write(block); err != nil {
		return &connError{xhttp2.ErrCodeCompression, "HPACK"}
	}
	if !complete {
		return nil
	}
	if err := c.dec.Close(); err != nil {
		return &connError{xhttp2.ErrCodeCompression, "HPACK"}
	}
	id := h.stream
	h.stream = 0
	if h.selfish {
		h.bad("priority")
	}
	if c.client {
		return c.responseHead(id)
	}
	return c.requestHead(id)
}

// malformed resets the stream of a head that is not acceptable.
func (c *conn) malformed(id uint32) error {
	c.cfg.OnReject(c.head.malformed)
	c.resetStream(id, &streamError{xhttp2.ErrCodeProtocol, c.head.malformed})
	return nil
}

// putFields encodes fields. It needs mu, as do the others.
func (c *conn) putFields(fields message.Fields) {
	for i := range fields {
		c.enc.field(fields[i].Name, fields[i].Value)
	}
}

func (c *conn) encodeRequest(r *message.Request) {
	e := &c.enc
	e.begin()
	method := r.Method
	if r.Protocol != "" {
		method = "CONNECT"
	}
	e.field(":method", method)
	if method != "CONNECT" || r.Protocol != "" {
		e.field(":scheme", r.Scheme)
		e.field(":path", r.Path)
	}
	if r.Authority != "" {
		e.field(":authority", r.Authority)
	}
	if r.Protocol != "" {
		e.field(":protocol", r.Protocol)
	}
	if method != "CONNECT" && (r.Length > 0 || r.Length == 0 && (method == "POST" || method == "PUT" || method == "PATCH")) {
		e.number(indexLength, r.Length)
	}
	c.putFields(r.Fields)
}

func (c *conn) encodeResponse(status int, fields message.Fields, length int64) {
	c.enc.begin()
	c.enc.status(status)
	if length >= 0 {
		c.enc.number(indexLength, length)
	}
	c.putFields(fields)
}

// The bytes of tokens (RFC 9110 §5.6.2), and of those in lower case.
var tokenBytes, nameBytes = func() (token, name [256]bool) {
	for b := range 256 {
		c := byte(b)
		token[b] = c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c != 0 && strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0
		name[b] = token[b] && !(c >= 'A' && c <= 'Z')
	}
	return token, name
}()

func all(s string, ok *[256]bool) bool {
	for i := range len(s) {
		if !ok[s[i]] {
			return false
		}
	}
	return s != ""
}

func validToken(s string) bool { return all(s, &tokenBytes) }
func validName(s string) bool  { return all(s, &nameBytes) }

// validValue is RFC 9113 §8.2.1, and no other control character either.
func validValue(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return s == "" || s[0] != ' ' && s[0] != '\t' && s[len(s)-1] != ' ' && s[len(s)-1] != '\t'
}

// validAuthority holds for what no reader can take for something else; userinfo is deprecated (RFC 9113 §8.3.1).
func validAuthority(s string) bool {
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c >= 0x7f || strings.IndexByte("@/\\?#<>\"^`{|},", c) >= 0 {
			return false
		}
	}
	return true
}

func digits(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return s != ""
}
