package proxytest

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"

	"github.com/hanse-mesh/hanse/proxy/message"
)

// Opener begins an exchange: a hop.Client towards one peer, or an http1.Client.
type Opener func(ctx context.Context, r *message.Request, o message.Options) (message.ClientStream, error)

// RoundTrip sends a request of net/http, so that tests can be written in its terms.
func RoundTrip(open Opener, req *http.Request) (*http.Response, error) {
	r := &message.Request{Method: req.Method, Scheme: req.URL.Scheme, Authority: req.Host, Path: req.URL.RequestURI(), Length: req.ContentLength, Fields: fieldsOf(req.Header)}
	if r.Authority == "" {
		r.Authority = req.URL.Host
	}
	if r.Method == http.MethodConnect {
		r.Path, r.Scheme = "", ""
	}
	if req.Body != nil && req.ContentLength == 0 {
		r.Length = message.Unknown
	}
	s, err := open(req.Context(), r, message.Options{End: req.Body == nil || req.Body == http.NoBody})
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(req.Context(), func() { s.Cancel(context.Cause(req.Context())) })
	var sending sync.WaitGroup
	if req.Body != nil && req.Body != http.NoBody {
		sending.Go(func() {
			defer req.Body.Close()
			buf := make([]byte, 32<<10)
			for {
				n, err := req.Body.Read(buf)
				if n > 0 {
					if _, werr := s.Write(buf[:n]); werr != nil || s.Flush() != nil {
						return
					}
				}
				if errors.Is(err, io.EOF) {
					_ = s.End(fieldsOf(req.Trailer))
					return
				}
				if err != nil {
					s.Cancel(err)
					return
				}
			}
		})
	}
	resp, err := s.Response()
	if err != nil {
		stop()
		s.Cancel(err)
		sending.Wait()
		s.Close()
		return nil, err
	}
	out := &http.Response{StatusCode: resp.Status, Header: headerOf(resp.Fields), ContentLength: resp.Length, Request: req, Proto: "HTTP/2.0", ProtoMajor: 2, Trailer: http.Header{}}
	if resp.Length >= 0 {
		out.Header.Set("Content-Length", strconv.FormatInt(resp.Length, 10))
	}
	out.Body = &clientBody{s: s, resp: out, end: func() { stop(); s.Cancel(nil); sending.Wait(); s.Close() }}
	return out, nil
}

type clientBody struct {
	s    message.ClientStream
	resp *http.Response
	once sync.Once
	end  func()
}

func (b *clientBody) Read(p []byte) (int, error) {
	n, err := b.s.Read(p)
	if errors.Is(err, io.EOF) {
		for k, v := range headerOf(b.s.Trailers()) {
			b.resp.Trailer[k] = v
		}
	}
	return n, err
}

func (b *clientBody) Close() error {
	b.once.Do(b.end)
	return nil
}

// Handler serves exchanges by a handler of net/http.
func Handler(h http.Handler) func(message.ServerStream) {
	return func(s message.ServerStream) {
		r := s.Request()
		u, err := url.ParseRequestURI(r.Path)
		if err != nil {
			u = &url.URL{}
		}
		ctx, cancel := context.WithCancelCause(context.Background())
		defer cancel(nil)
		s.OnAbort(cancel)
		req := (&http.Request{Method: r.Method, URL: u, Host: r.Authority, Header: headerOf(r.Fields), ContentLength: r.Length, Proto: "HTTP/2.0", ProtoMajor: 2,
			RequestURI: r.Path, Trailer: http.Header{}}).WithContext(ctx)
		req.Body = &serverBody{s: s, req: req}
		w := &responseWriter{s: s, header: http.Header{}}
		defer func() {
			if p := recover(); p == http.ErrAbortHandler {
				s.Abort(nil)
			} else if p != nil {
				panic(p)
			}
		}()
		h.ServeHTTP(w, req)
		if !w.wrote {
			w.WriteHeader(http.StatusOK)
		}
		trailers := message.Fields{}
		for name, values := range w.header {
			if t, ok := strings.CutPrefix(name, http.TrailerPrefix); ok {
				name = t
			} else if !w.announced[name] {
				continue
			}
			for _, v := range values {
				trailers.Add(strings.ToLower(name), v)
			}
		}
		_ = s.End(trailers)
	}
}

type serverBody struct {
	s   message.ServerStream
	req *http.Request
}

func (b *serverBody) Read(p []byte) (int, error) {
	n, err := b.s.Read(p)
	if errors.Is(err, io.EOF) {
		for k, v := range headerOf(b.s.Trailers()) {
			b.req.Trailer[k] = v
		}
	}
	return n, err
}
func (b *serverBody) Close() error { return nil }

type responseWriter struct {
	s         message.ServerStream
	header    http.Header
	wrote     bool
	announced map[string]bool
}

func (w *responseWriter) Header() http.Header { return w.header }

func (w *responseWriter) WriteHeader(status int) {
	if w.wrote {
		return
	}
	if status < 200 {
		_ = w.s.Inform(status, fieldsOf(w.header))
		return
	}
	w.wrote = true
	r := &message.Response{Status: status, Fields: fieldsOf(w.header), Length: message.Unknown}
	if n, err := strconv.ParseInt(w.header.Get("Content-Length"), 10, 64); err == nil {
		r.Length = n
	}
	w.announced = map[string]bool{}
	for _, v := range w.header["Trailer"] {
		for name := range strings.SplitSeq(v, ",") {
			w.announced[http.CanonicalHeaderKey(strings.TrimSpace(name))] = true
		}
	}
	_ = w.s.Respond(r, false)
}

func (w *responseWriter) Write(p []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	return w.s.Write(p)
}

func (w *responseWriter) Flush() {
	w.WriteHeader(http.StatusOK)
	_ = w.s.Flush()
}

func fieldsOf(h http.Header) (out message.Fields) {
	for name, values := range h {
		name = strings.ToLower(name)
		switch name {
		case "content-length", "transfer-encoding", "connection", "host", "expect", "upgrade":
			continue
		}
		if strings.HasPrefix(name, "trailer:") {
			continue
		}
		for _, v := range values {
			out.Add(name, v)
		}
	}
	return out
}

func headerOf(f message.Fields) http.Header {
	h := http.Header{}
	for i := range f {
		h.Add(f[i].Name, f[i].Value)
	}
	return h
}
