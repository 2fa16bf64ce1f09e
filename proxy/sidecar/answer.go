package sidecar

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"google.golang.org/grpc/codes"

	"github.com/hanse-mesh/hanse/proxy"
	"github.com/hanse-mesh/hanse/proxy/message"
)

const (
	headerTarget      = "hanse-target"
	headerStatus      = "hanse-status"
	headerUnprocessed = "hanse-unprocessed"
	headerError       = "hanse-error"
	headerPeerAddress = "hanse-peer-address"
	headerClientCert  = "x-forwarded-client-cert"
)

// failure is an answer of the proxy itself.
type failure struct {
	code   string
	status int
	grpc   codes.Code
	detail string

	unprocessed bool // nothing reached the application
}

func (f *failure) Error() string { return f.code + ": " + f.detail }

// The codes of failures, as hanse-error names them; docs/operations.md lists them.
const (
	codeBadRequest     = "bad_request"
	codeUnknownService = "unknown_service"
	codeNoConfig       = "control_plane_unavailable"
	codeNoRoute        = "no_route"
	codeNoBackend      = "no_backend"
	codeNoEndpoint     = "no_healthy_endpoint"
	codeOverloaded     = "overloaded"
	codeUnreachable    = "unreachable"
	codeLost           = "connection_lost"
	codeTimeout        = "timeout"
	codeDenied         = "denied"
	codeWrongTarget    = "wrong_target"
	codeNoApp          = "app_unreachable"
	codeAppFailed      = "app_failed"
	codeDraining       = "draining"
	codeFault          = "fault"
	codePlaintext      = "plaintext_refused"
	codeCanceled       = "canceled" // of the access log: the caller went away
)

// known failures' statuses: HTTP and gRPC.
func failWith(code, format string, args ...any) *failure {
	f := &failure{code: code, detail: fmt.Sprintf(format, args...)}
	switch code {
	case codeBadRequest:
		f.status, f.grpc = http.StatusBadRequest, codes.InvalidArgument
	case codeUnknownService:
		f.status, f.grpc = http.StatusBadGateway, codes.Unavailable
	case codeNoRoute:
		f.status, f.grpc = http.StatusNotFound, codes.Unimplemented
	case codeNoBackend, codeFault:
		f.status, f.grpc = http.StatusInternalServerError, codes.Unavailable
	case codeLost, codeAppFailed:
		f.status, f.grpc = http.StatusBadGateway, codes.Unavailable
	case codeTimeout:
		f.status, f.grpc = http.StatusGatewayTimeout, codes.DeadlineExceeded
	case codeDenied, codePlaintext:
		f.status, f.grpc = http.StatusForbidden, codes.PermissionDenied
	case codeWrongTarget:
		f.status, f.grpc, f.unprocessed = http.StatusMisdirectedRequest, codes.Unavailable, true
	case codeCanceled:
		f.status, f.grpc = 499, codes.Canceled
	default: // what may pass: no endpoint, no configuration yet, draining …
		f.status, f.grpc = http.StatusServiceUnavailable, codes.Unavailable
		f.unprocessed = code == codeNoApp || code == codeDraining
	}
	return f
}

// isGRPC reports whether the caller expects its status in trailers.
func isGRPC(fields message.Fields) bool {
	v, _ := fields.Get("content-type")
	rest, ok := strings.CutPrefix(v, "application/grpc")
	return ok && (rest == "" || rest[0] == '+' || rest[0] == ';')
}

// write answers with f; extra fields go along. between says that the reader is a sidecar, which learns whether trying elsewhere is safe.
func (f *failure) write(s message.ServerStream, extra message.Fields, between bool) {
	r := s.Request()
	h := append(extra, message.Field{Name: headerError, Value: f.code})
	if between && f.unprocessed {
		h.Add(headerUnprocessed, "true")
	}
	if isGRPC(r.Fields) { // Trailers-Only (gRPC over HTTP/2, Responses)
		h.Set("content-type", "application/grpc")
		h.Set("grpc-status", strconv.Itoa(int(f.grpc)))
		h.Set("grpc-message", grpcMessage("hanse: "+f.code+": "+f.detail))
		_ = s.Respond(&message.Response{Status: http.StatusOK, Fields: h, Length: message.Unknown}, true)
		return
	}
	h.Set("cache-control", "no-store")
	var body []byte
	if strings.Contains(r.Fields.Value("accept"), "application/json") {
		h.Set("content-type", "application/json")
		body, _ = json.Marshal(map[string]string{"error": f.code, "detail": f.detail})
		body = append(body, '\n')
	} else {
		h.Set("content-type", "text/plain; charset=utf-8")
		body = []byte("hanse: " + f.code + ": " + strings.ReplaceAll(f.detail, "\n", " ") + "\n")
	}
	if s.Respond(&message.Response{Status: f.status, Fields: h, Length: int64(len(body))}, false) == nil {
		_, _ = s.Write(body)
		_ = s.End(nil)
	}
}

// grpcMessage percent-encodes as gRPC over HTTP/2 wants it.
func grpcMessage(s string) string {
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; c >= ' ' && c <= '~' && c != '%' {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

// stripOwn removes our own fields, which nobody but a sidecar may set.
func stripOwn(fields *message.Fields) {
	for i := range *fields {
		if strings.HasPrefix((*fields)[i].Name, "hanse-") {
			fields.DelFunc(func(name string) bool { return strings.HasPrefix(name, "hanse-") })
			return
		}
	}
}

// editor lets header edits reach a message; what frames it or routes it is not theirs. authority may be nil.
type editor struct {
	fields    *message.Fields
	authority *string
}

// edit applies edits, if there are any.
func edit(edits *proxy.HeaderEdits, fields *message.Fields, authority *string) {
	if len(edits.Set)+len(edits.Add)+len(edits.Remove) > 0 {
		edits.Apply(editor{fields, authority})
	}
}

func (e editor) name(name string) string {
	switch name = strings.ToLower(name); name {
	case "content-length", "transfer-encoding", "connection", "keep-alive", "upgrade", "te", "trailer", "proxy-connection", "expect":
		return ""
	}
	if strings.HasPrefix(name, "hanse-") {
		return ""
	}
	return name
}

func (e editor) Set(name, value string) {
	switch name = e.name(name); {
	case name == "host" && e.authority != nil:
		*e.authority = value
	case name != "" && name != "host":
		e.fields.Set(name, value)
	}
}

func (e editor) Add(name, value string) {
	if name = e.name(name); name != "" && name != "host" {
		e.fields.Add(name, value)
	}
}

func (e editor) Del(name string) {
	if name = e.name(name); name != "" && name != "host" {
		e.fields.Del(name)
	}
}
