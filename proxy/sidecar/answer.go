package sidecar

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"google.golang.org/grpc/codes"
)

const (
	headerTarget      = "Hanse-Target"
	headerUpgrade     = "Hanse-Upgrade"
	headerPath        = "Hanse-Path"
	headerHost        = "Hanse-Host"
	headerStatus      = "Hanse-Status"
	headerUnprocessed = "Hanse-Unprocessed"
	headerError       = "Hanse-Error"
	headerPeerAddress = "Hanse-Peer-Address"
	headerClientCert  = "X-Forwarded-Client-Cert"
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

// The codes of failures, as hanse-error names them.
const (
	codeBadRequest     = "bad_request"
	codeUnknownService = "unknown_service"
	codeNoConfig       = "control_plane_unavailable"
	codeNoIdentity     = "no_identity"
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
	case codeDenied:
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
func isGRPC(h http.Header) bool {
	rest, ok := strings.CutPrefix(h.Get("Content-Type"), "application/grpc")
	return ok && (rest == "" || rest[0] == '+' || rest[0] == ';')
}

// write answers with f. between says that the reader is a sidecar, which learns whether trying elsewhere is safe.
func (f *failure) write(w http.ResponseWriter, r *http.Request, between bool) {
	h := w.Header()
	h.Set(headerError, f.code)
	if between && f.unprocessed {
		h.Set(headerUnprocessed, "true")
	}
	if isGRPC(r.Header) { // Trailers-Only (gRPC over HTTP/2, Responses)
		h.Set("Content-Type", "application/grpc")
		h.Set("Grpc-Status", strconv.Itoa(int(f.grpc)))
		h.Set("Grpc-Message", grpcMessage("hanse: "+f.code+": "+f.detail))
		w.WriteHeader(http.StatusOK)
		return
	}
	h.Set("Cache-Control", "no-store")
	var body []byte
	if strings.Contains(r.Header.Get("Accept"), "application/json") {
		h.Set("Content-Type", "application/json")
		body, _ = json.Marshal(map[string]string{"error": f.code, "detail": f.detail})
		body = append(body, '\n')
	} else {
		h.Set("Content-Type", "text/plain; charset=utf-8")
		body = []byte("hanse: " + f.code + ": " + strings.ReplaceAll(f.detail, "\n", " ") + "\n")
	}
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(f.status)
	if r.Method != http.MethodHead {
		_, _ = w.Write(body)
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
func stripOwn(h http.Header) {
	for name := range h {
		if strings.HasPrefix(name, "Hanse-") {
			delete(h, name)
		}
	}
}

// stripHopByHop removes what concerns one connection only (RFC 9110 §7.6.1). "TE: trailers" stays, as gRPC wants it.
func stripHopByHop(h http.Header) {
	for _, field := range h["Connection"] {
		for name := range strings.SplitSeq(field, ",") {
			if name = strings.TrimSpace(name); !strings.EqualFold(name, "te") {
				h.Del(name)
			}
		}
	}
	te := false
	for _, field := range h["Te"] {
		for coding := range strings.SplitSeq(field, ",") {
			te = te || strings.EqualFold(strings.TrimSpace(coding), "trailers")
		}
	}
	for _, name := range [...]string{"Connection", "Keep-Alive", "Proxy-Connection", "Proxy-Authenticate", "Proxy-Authorization", "Te", "Transfer-Encoding", "Upgrade", "Http2-Settings"} {
		delete(h, name)
	}
	if te {
		h["Te"] = []string{"trailers"}
	}
}

// keepUserAgent stops net/http from naming itself where the caller named nobody.
func keepUserAgent(h http.Header) {
	if _, ok := h["User-Agent"]; !ok {
		h["User-Agent"] = []string{""}
	}
}

// upgradeOf returns the protocol that a request asks to switch to, or "".
func upgradeOf(h http.Header) string {
	for _, field := range h["Connection"] {
		for name := range strings.SplitSeq(field, ",") {
			if strings.EqualFold(strings.TrimSpace(name), "upgrade") {
				return h.Get("Upgrade")
			}
		}
	}
	return ""
}

// requestPath returns the path as received, without query.
func requestPath(u *url.URL) string {
	if u.Opaque != "" {
		return u.Opaque
	}
	if p := u.EscapedPath(); p != "" {
		return p
	}
	return "/"
}

// setPath makes u carry an escaped path as it stands.
func setPath(u *url.URL, escaped string) error {
	p, err := url.PathUnescape(escaped)
	if err != nil {
		return fmt.Errorf("path %q: %w", escaped, err)
	}
	u.Path, u.RawPath, u.Opaque = p, escaped, ""
	return nil
}
