package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/hanse-mesh/hanse/identity/peercred"
)

const (
	// maxBody bounds a request, in bytes.
	maxBody = 8 << 20
	// writeTimeout is how long one event may take to be written, and the deadline of each answer that is not a stream.
	writeTimeout = 30 * time.Second

	typeJSON   = "application/json"
	typeNDJSON = "application/x-ndjson"
	typeYAML   = "application/yaml"
)

// Handler serves b. It authorises nobody: the socket's permissions or the listener's TLS have done so.
// What changes something is logged as Info by its method and path, never with its body.
func Handler(b Backend, log *slog.Logger) http.Handler {
	h := &handler{b: b, log: log, mux: http.NewServeMux()}
	answer(h, "GET /v1/status", func(ctx context.Context, r *http.Request) (any, error) { return b.Status(ctx) })
	answer(h, "GET /v1/clusters", func(ctx context.Context, r *http.Request) (any, error) { return b.Clusters(ctx) })
	answer(h, "POST /v1/clusters/{member}/accept", func(ctx context.Context, r *http.Request) (any, error) {
		return struct{}{}, b.AcceptHeld(ctx, r.PathValue("member"))
	})
	answer(h, "GET /v1/services", func(ctx context.Context, r *http.Request) (any, error) { return list(b.Services(ctx)) })
	answer(h, "GET /v1/endpoints", func(ctx context.Context, r *http.Request) (any, error) {
		return list(b.Endpoints(ctx, r.URL.Query().Get("service")))
	})
	answer(h, "GET /v1/proxies", func(ctx context.Context, r *http.Request) (any, error) { return list(b.Proxies(ctx)) })
	answer(h, "POST /v1/explain", decoded(func(ctx context.Context, req ExplainRequest) (any, error) { return b.Explain(ctx, req) }))

	answer(h, "POST /v1/tokens", decoded(func(ctx context.Context, req TokenRequest) (any, error) { return b.CreateToken(ctx, req) }))
	answer(h, "POST /v1/admins", decoded(func(ctx context.Context, req AdminRequest) (any, error) { return b.IssueAdmin(ctx, req) }))
	answer(h, "GET /v1/identities", func(ctx context.Context, r *http.Request) (any, error) {
		if id := r.URL.Query().Get("id"); id != "" {
			return b.Identity(ctx, id)
		}
		return list(b.Identities(ctx))
	})
	answer(h, "POST /v1/mint", decoded(func(ctx context.Context, req MintRequest) (any, error) { return b.Mint(ctx, req) }))
	stream(h, "POST /v1/join", func(ctx context.Context, req JoinRequest, emit func(Event) error) (any, error) {
		return b.Join(ctx, req, emit)
	})
	answer(h, "POST /v1/leave", decoded(func(ctx context.Context, req LeaveRequest) (any, error) { return b.Leave(ctx, req) }))

	answer(h, "GET /v1/trust", func(ctx context.Context, r *http.Request) (any, error) { return list(b.TrustList(ctx)) })
	answer(h, "POST /v1/trust", decoded(func(ctx context.Context, req TrustAdd) (any, error) { return b.TrustAdd(ctx, req) }))
	answer(h, "GET /v1/trust/{name}", func(ctx context.Context, r *http.Request) (any, error) {
		return b.TrustShow(ctx, r.PathValue("name"))
	})
	answer(h, "DELETE /v1/trust/{name}", func(ctx context.Context, r *http.Request) (any, error) {
		return struct{}{}, b.TrustRemove(ctx, r.PathValue("name"))
	})

	answer(h, "POST /v1/trust/{name}/refresh", func(ctx context.Context, r *http.Request) (any, error) {
		return b.TrustRefresh(ctx, r.PathValue("name"))
	})
	stream(h, "POST /v1/trust-rotate", func(ctx context.Context, req RotateRequest, emit func(Event) error) (any, error) {
		return b.TrustRotate(ctx, req, emit)
	})
	stream(h, "POST /v1/trust-distrust", func(ctx context.Context, req DistrustRequest, emit func(Event) error) (any, error) {
		return b.TrustDistrust(ctx, req, emit)
	})

	answer(h, "POST /v1/apply", h.apply)
	answer(h, "GET /v1/objects", func(ctx context.Context, r *http.Request) (any, error) {
		q := r.URL.Query()
		return list(b.ListObjects(ctx, q.Get("kind"), q.Get("namespace"), q.Get("name")))
	})
	answer(h, "DELETE /v1/objects", func(ctx context.Context, r *http.Request) (any, error) {
		q := r.URL.Query()
		return b.DeleteObject(ctx, q.Get("kind"), q.Get("namespace"), q.Get("name"))
	})

	answer(h, "GET /v1/drills", func(ctx context.Context, r *http.Request) (any, error) { return list(b.DrillList(ctx)) })
	answer(h, "POST /v1/drills/plan", decoded(func(ctx context.Context, spec DrillSpec) (any, error) { return b.DrillPlan(ctx, spec) }))
	stream(h, "POST /v1/drills", func(ctx context.Context, spec DrillSpec, emit func(Event) error) (any, error) {
		return b.DrillRun(ctx, spec, emit)
	})
	answer(h, "GET /v1/drills/{id}", func(ctx context.Context, r *http.Request) (any, error) {
		return b.DrillGet(ctx, r.PathValue("id"))
	})
	answer(h, "POST /v1/drills/{id}/stop", func(ctx context.Context, r *http.Request) (any, error) {
		return b.DrillStop(ctx, r.PathValue("id"))
	})

	h.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		h.fail(w, r, NotFound("hanse and hansed may be of different versions: compare `hanse version`", "no such operation: %s %s", r.Method, r.URL.Path))
	})
	return h.mux
}

type handler struct {
	b   Backend
	log *slog.Logger
	mux *http.ServeMux
}

// list makes an absent list an empty one, so that JSON has [] and not null.
func list[T any](l []T, err error) ([]T, error) {
	if l == nil {
		l = []T{}
	}
	return l, err
}

// answer registers an operation that has one answer.
func answer(h *handler, pattern string, op func(context.Context, *http.Request) (any, error)) {
	h.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		h.audit(r)
		v, err := op(r.Context(), r)
		if err != nil {
			h.fail(w, r, err)
			return
		}
		h.write(w, r, http.StatusOK, v)
	})
}

// stream registers an operation that emits Events. Once the first was written an error can only be the last of them.
func stream[Req any](h *handler, pattern string, op func(context.Context, Req, func(Event) error) (any, error)) {
	h.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		h.audit(r)
		var req Req
		if err := decode(r, &req); err != nil {
			h.fail(w, r, err)
			return
		}
		rc := http.NewResponseController(w)
		started := false
		emit := func(e Event) error {
			b, err := json.Marshal(e)
			if err != nil {
				return fmt.Errorf("encode event: %w", err)
			}
			if !started {
				started = true
				w.Header().Set("Content-Type", typeNDJSON)
			}
			if err := rc.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil && !errors.Is(err, http.ErrNotSupported) {
				return err
			}
			if _, err := w.Write(append(b, '\n')); err != nil {
				return fmt.Errorf("the client is gone: %w", err)
			}
			return rc.Flush()
		}
		v, err := op(r.Context(), req, emit)
		if err != nil && !started {
			h.fail(w, r, err)
			return
		}
		last := Event{Done: true}
		if err != nil {
			last = Event{Error: h.asError(r, err)}
		} else if last.Data, err = json.Marshal(v); err != nil {
			last = Event{Error: h.asError(r, fmt.Errorf("encode the result: %w", err))}
		}
		if err := emit(last); err != nil {
			h.log.Debug("admin client went away", "path", r.URL.Path, "err", err)
		}
	})
}

// decoded reads the request's body as a Req before op.
func decoded[Req any](op func(context.Context, Req) (any, error)) func(context.Context, *http.Request) (any, error) {
	return func(ctx context.Context, r *http.Request) (any, error) {
		var req Req
		if err := decode(r, &req); err != nil {
			return nil, err
		}
		return op(ctx, req)
	}
}

// decode reads exactly one JSON value without unknown fields.
func decode(r *http.Request, v any) error {
	b, err := body(r)
	if err != nil {
		return err
	}
	if err := decodeStrict(b, v); err != nil {
		return Invalid("hanse and hansed may be of different versions: compare `hanse version`", "decode the request: %v", err)
	}
	return nil
}

func decodeStrict(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more than one JSON value")
	}
	return nil
}

func body(r *http.Request) ([]byte, error) {
	b, err := io.ReadAll(http.MaxBytesReader(nil, r.Body, maxBody))
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
		return nil, &Error{Status: http.StatusRequestEntityTooLarge, Message: fmt.Sprintf("the request is larger than %d MiB", maxBody>>20), Hint: "apply in several parts"}
	}
	if err != nil {
		return nil, Invalid("", "read the request: %v", err)
	}
	return b, nil
}

func (h *handler) apply(ctx context.Context, r *http.Request) (any, error) {
	dryRun := false
	if s := r.URL.Query().Get("dryRun"); s != "" {
		var err error
		if dryRun, err = strconv.ParseBool(s); err != nil {
			return nil, Invalid("", "dryRun=%q: must be true or false", s)
		}
	}
	b, err := body(r)
	if err != nil {
		return nil, err
	}
	return list(h.b.Apply(ctx, b, dryRun))
}

// callerKey is of the context of a connection: who called, as the kernel has it.
type callerKey struct{}

// WithCaller is the ConnContext of an http.Server on a Unix socket: what is done is noted with the user and the process that did it.
func WithCaller(ctx context.Context, c net.Conn) context.Context {
	if caller, err := peercred.Of(c); err == nil {
		return context.WithValue(ctx, callerKey{}, caller)
	}
	return ctx
}

func (h *handler) audit(r *http.Request) {
	level := slog.LevelInfo
	if r.Method == http.MethodGet {
		level = slog.LevelDebug
	}
	peer := "local socket"
	if caller, ok := r.Context().Value(callerKey{}).(peercred.Caller); ok {
		peer += ", " + caller.String()
	}
	if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 && len(r.TLS.PeerCertificates[0].URIs) > 0 {
		peer = r.TLS.PeerCertificates[0].URIs[0].String()
	}
	h.log.Log(r.Context(), level, "admin operation", "method", r.Method, "path", r.URL.Path, "by", peer)
}

// asError is what the client gets of err. Those that are not *Error are logged, for they are ours.
func (h *handler) asError(r *http.Request, err error) *Error {
	if e := (*Error)(nil); errors.As(err, &e) {
		return e
	}
	if r.Context().Err() == nil {
		h.log.Error("admin operation", "method", r.Method, "path", r.URL.Path, "err", err)
	}
	return &Error{Status: http.StatusInternalServerError, Message: err.Error()}
}

func (h *handler) fail(w http.ResponseWriter, r *http.Request, err error) {
	e := h.asError(r, err)
	status := e.Status
	if status < 400 || status > 599 {
		status = http.StatusInternalServerError
	}
	h.write(w, r, status, e)
}

func (h *handler) write(w http.ResponseWriter, r *http.Request, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		h.log.Error("encode an admin answer", "path", r.URL.Path, "err", err)
		status, b = http.StatusInternalServerError, []byte(`{"error":"hansed could not encode its answer"}`)
	}
	w.Header().Set("Content-Type", typeJSON)
	if err := http.NewResponseController(w).SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil && !errors.Is(err, http.ErrNotSupported) {
		h.log.Debug("admin client went away", "path", r.URL.Path, "err", err)
		return
	}
	w.WriteHeader(status)
	if _, err := w.Write(append(b, '\n')); err != nil {
		h.log.Debug("admin client went away", "path", r.URL.Path, "err", err)
	}
}

// Fail answers a request with an error, as Handler does.
func Fail(w http.ResponseWriter, r *http.Request, err error, log *slog.Logger) {
	(&handler{log: log}).fail(w, r, err)
}

// StepEvent says what is being done now.
func StepEvent(format string, args ...any) Event { return Event{Step: fmt.Sprintf(format, args...)} }

// CheckEvent is a fact that was found.
func CheckEvent(c Check) Event { return Event{Check: &c} }

// DrillEvent is a drill as it stands.
func DrillEvent(d Drill) (Event, error) { return DataEvent(d) }

// DataEvent is an operation's payload as it stands.
func DataEvent(v any) (Event, error) {
	b, err := json.Marshal(v)
	return Event{Data: b}, err
}
