package objects

import (
	"errors"
	"fmt"
	"strings"

	"github.com/hashicorp/go-multierror"
)

// Fault is one thing wrong with one field, said so that a person can correct it.
type Fault struct {
	File   string `json:"file,omitempty"` // "" where the object did not come from a file
	Line   int    `json:"line,omitempty"` // from 1; 0 is the whole file, or unknown
	Object string `json:"object,omitempty"`
	Field  string `json:"field,omitempty"` // such as spec.rules[0].backendRefs[1].port
	Value  string `json:"value,omitempty"` // what was found, shortened
	Reason string `json:"reason"`          // what is wrong with it and what to do

	// Pending says that the object is right by itself: what it refers to is missing here, or does not suit it, and may yet.
	Pending bool `json:"pending,omitempty"`

	// Foreign says that it is none where other controllers read the same objects: a parent that may be theirs. Build leaves such parents out.
	Foreign bool `json:"-"`

	Condition string `json:"-"` // the reason in a route's status, where it is not UnsupportedValue
}

// Error returns "file:line: object: field: value: reason" without the parts that are unknown.
func (f *Fault) Error() string {
	var parts []string
	switch {
	case f.File != "" && f.Line > 0:
		parts = append(parts, fmt.Sprintf("%s:%d", f.File, f.Line))
	case f.File != "":
		parts = append(parts, f.File)
	}
	for _, p := range []string{f.Object, f.Field} {
		if p != "" {
			parts = append(parts, p)
		}
	}
	if f.Value != "" {
		parts = append(parts, fmt.Sprintf("%q", f.Value))
	}
	return strings.Join(append(parts, f.Reason), ": ")
}

// maxValue bounds Fault.Value, in bytes.
const maxValue = 80

func shorten(s string) string {
	if len(s) <= maxValue {
		return s
	}
	return strings.ToValidUTF8(s[:maxValue], "") + "…"
}

// maxFaults are listed of one file.
const maxFaults = 100

// asError joins faults into one go-multierror with one fault a line, or nil.
func asError(faults []*Fault) error {
	if len(faults) == 0 {
		return nil
	}
	e := &multierror.Error{ErrorFormat: func(errs []error) string {
		lines := make([]string, len(errs))
		for i, err := range errs {
			lines[i] = err.Error()
		}
		return strings.Join(lines, "\n")
	}}
	for i, f := range faults {
		if i == maxFaults {
			e.Errors = append(e.Errors, &Fault{File: f.File,
				Reason: fmt.Sprintf("and %d more faults; correct these first", len(faults)-maxFaults)})
			break
		}
		e.Errors = append(e.Errors, f)
	}
	return e
}

// Faults lists the faults that an error of this package holds. An error of another kind becomes one fault.
func Faults(err error) []*Fault {
	if err == nil {
		return nil
	}
	var many *multierror.Error
	if !errors.As(err, &many) {
		many = &multierror.Error{Errors: []error{err}}
	}
	var faults []*Fault
	for _, e := range many.Errors {
		var f *Fault
		if !errors.As(e, &f) {
			f = &Fault{Reason: e.Error()}
		}
		faults = append(faults, f)
	}
	return faults
}
