package message

import (
	"errors"
	"fmt"
	"strings"
)

// Field is one field line. Name is lower case.
type Field struct{ Name, Value string }

// Fields are field lines in the order of the wire.
type Fields []Field

// Get returns the first value of a field, and whether there is one. name is lower case, here and below.
func (f Fields) Get(name string) (string, bool) {
	for i := range f {
		if f[i].Name == name {
			return f[i].Value, true
		}
	}
	return "", false
}

// Value is Get, with "" where there is none.
func (f Fields) Value(name string) string {
	v, _ := f.Get(name)
	return v
}

// Joined returns all values of a field, joined with ", " (RFC 9110 §5.3), and whether there is any.
func (f Fields) Joined(name string) (string, bool) {
	first, n := "", 0
	for i := range f {
		if f[i].Name == name {
			if n++; n == 1 {
				first = f[i].Value
			}
		}
	}
	if n < 2 {
		return first, n == 1
	}
	var b strings.Builder
	n = 0
	for i := range f {
		if f[i].Name == name {
			if n++; n > 1 {
				b.WriteString(", ")
			}
			b.WriteString(f[i].Value)
		}
	}
	return b.String(), true
}

// Add appends a field line.
func (f *Fields) Add(name, value string) { *f = append(*f, Field{name, value}) }

// Set replaces all lines of a field by one.
func (f *Fields) Set(name, value string) {
	for i := range *f {
		if (*f)[i].Name == name {
			(*f)[i].Value = value
			rest := (*f)[i+1:]
			rest.Del(name)
			*f = (*f)[:i+1+len(rest)]
			return
		}
	}
	f.Add(name, value)
}

// Del removes all lines of a field, in place.
func (f *Fields) Del(name string) {
	f.DelFunc(func(n string) bool { return n == name })
}

// DelFunc removes the lines whose name del holds for, in place.
func (f *Fields) DelFunc(del func(name string) bool) {
	kept := (*f)[:0]
	for _, x := range *f {
		if !del(x.Name) {
			kept = append(kept, x)
		}
	}
	clear((*f)[len(kept):])
	*f = kept
}

// Unknown is the Length of a body whose end its framing shows.
const Unknown = -1

// Request is the head of a request.
type Request struct {
	Method    string
	Scheme    string // "http" or "https"; "" for CONNECT without Protocol
	Authority string // Host, or :authority
	Path      string // with query, as received: "/a%2Fb?c", or "*"; "" for CONNECT without Protocol
	Protocol  string // what is asked to switch to: Method is GET whatever the wire said. "" for all others
	Fields    Fields
	Length    int64 // of the body in bytes; 0: none; Unknown
}

// Response is the head of a response.
type Response struct {
	Status int // 101: switched to the Request's Protocol
	Fields Fields
	Length int64 // of the body in bytes; of what would be the body for HEAD and 304; Unknown
}

// ServerStream is one exchange as its server sees it. One goroutine may read and another write at the same time; OnAbort and Abort may be called by any.
type ServerStream interface {
	// Request is the head that has arrived.
	Request() *Request
	// Read reads the body. io.EOF is its end; then Trailers has what followed. Where the caller waits for a 100 (Continue), the first Read
	// sends it.
	Read(p []byte) (int, error)
	// Ready reports whether Read would return at once.
	Ready() bool
	// CloseRead ends a Read that waits, and all later ones: what is left of the request is not wanted. Any goroutine may call it.
	CloseRead()
	Trailers() Fields
	// Inform sends an informational response other than 100 and 101. What the caller does not understand is left out silently.
	Inform(status int, fields Fields) error
	// Respond sends the final head; end: nothing follows. Heads and bodies may wait for more until Flush or End.
	Respond(r *Response, end bool) error
	// Write sends bytes of the body; it waits while the caller does not take them.
	Write(p []byte) (int, error)
	// Flush lets nothing wait.
	Flush() error
	// End ends the response, with trailers if not empty.
	End(trailers Fields) error
	// Abort breaks the exchange off: the caller sees that the response is not whole. After End it does nothing.
	Abort(err error)
	// OnAbort has f called once, when the caller has given the exchange up or its connection is gone, at once if it already has. It
	// replaces the f of before; nil is none. f must not wait for anything. It is not called after the handler has returned.
	OnAbort(f func(err error))
}

// ClientStream is one exchange as its client sees it. One goroutine may write and another read at the same time; Cancel may be called by any.
type ClientStream interface {
	// Write sends bytes of the request's body; it waits while the peer does not take them.
	Write(p []byte) (int, error)
	// Flush lets nothing wait.
	Flush() error
	// End ends the request, with trailers if not empty.
	End(trailers Fields) error
	// Response waits for the final head.
	Response() (*Response, error)
	// Read reads the response's body. io.EOF is its end; then Trailers has what followed.
	Read(p []byte) (int, error)
	// Ready reports whether Read would return at once.
	Ready() bool
	Trailers() Fields
	// Cancel gives the exchange up: all that waits returns an Error with this cause.
	Cancel(err error)
	// Close ends the use of the stream, and cancels what is not over. It must be called once, after everything else.
	Close()
}

// Options of one exchange at its client.
type Options struct {
	End    bool                            // the request has no body and no trailers
	Inform func(status int, fields Fields) // called from Response for informational heads other than 100; nil: they are dropped
}

// ErrUnsupported is returned for what a codec cannot express, such as trailers to HTTP/1.0.
var ErrUnsupported = errors.New("not supported by this version of HTTP")

// Error is the failure of an exchange, never an answer of the peer.
type Error struct {
	Sent bool   // the request may have reached an application
	Code uint32 // the RST_STREAM or GOAWAY code where the peer sent one (RFC 9113 §7)
	Err  error
}

// Error implements error.
func (e *Error) Error() string {
	if e.Code != 0 {
		return fmt.Sprintf("%v (code %d)", e.Err, e.Code)
	}
	return e.Err.Error()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Sent reports whether the request that failed with err may have reached an application.
func Sent(err error) bool {
	var e *Error
	return !errors.As(err, &e) || e.Sent
}
