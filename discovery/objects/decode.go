package objects

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Bounds of one file.
const (
	MaxFileBytes = 16 << 20
	MaxObjects   = 65536
	MaxEndpoints = 65536     // of one EndpointSlice
	maxEntries   = 1_000_000 // lines and commas: bounds the memory that parsing takes
	maxAliased   = 100_000   // values reached through YAML aliases
	maxDepth     = 100
)

// Read decodes what r yields, at most MaxFileBytes. The name file is only used in faults.
func Read(r io.Reader, file string) ([]Object, error) {
	data, err := io.ReadAll(io.LimitReader(r, MaxFileBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", file, err)
	}
	return Decode(data, file)
}

// Decode reads the objects of a YAML or JSON file: documents, each one object or a List of them. It refuses unknown
// fields, duplicate keys and values of a wrong type or range, and checks each object with Validate. It returns the
// objects without fault, and all faults as one *multierror.Error of *Fault (see Faults). An object that is namespaced and
// names no namespace is in "default".
func Decode(data []byte, file string) ([]Object, error) {
	tooLarge := ""
	if len(data) > MaxFileBytes {
		tooLarge = fmt.Sprintf("larger than %d MiB", MaxFileBytes>>20)
	} else if bytes.Count(data, []byte("\n"))+bytes.Count(data, []byte(",")) > maxEntries {
		tooLarge = fmt.Sprintf("more than %d lines and list entries", maxEntries)
	}
	if tooLarge != "" {
		return nil, asError([]*Fault{{File: file, Reason: fmt.Sprintf(
			"%s; split it (an EndpointSlice holds at most %d endpoints, and a Service may have many slices)", tooLarge, MaxEndpoints)}})
	}
	if m := findStrangeBreak(data); m != nil {
		return nil, asError([]*Fault{{File: file, Line: 1 + bytes.Count(data[:m[0]], []byte("\n")), Value: string(data[m[0]:m[1]]),
			Reason: `a line break that editors do not show; end lines with \n or \r\n, and write others in double quotes, as "\u2028"`}})
	}
	d := &decoder{file: file, fields: map[reflect.Type]map[string][]int{}}
	for _, doc := range splitDocuments(data) {
		d.document(doc)
	}
	d.refuseDuplicates()
	slices.SortStableFunc(d.faults, func(a, b *Fault) int { return cmp.Compare(a.Line, b.Line) })
	return d.objects, asError(d.faults)
}

// strangeBreak matches what YAML counts as a line break beside \n and \r\n: with one, its line numbers are not those of the file.
var strangeBreak = regexp.MustCompile(`\r[^\n]|\r$|\x{85}|\x{2028}|\x{2029}`)

func findStrangeBreak(data []byte) []int {
	for _, b := range []string{"\r", "\u0085", "\u2028", "\u2029"} { // cheap, and in most files there is none
		if bytes.Contains(data, []byte(b)) {
			return strangeBreak.FindIndex(data)
		}
	}
	return nil
}

// document is the text of one YAML document and the number of lines of the file before it.
type document struct {
	text   []byte
	before int
}

// splitDocuments cuts at document markers ("---" and "..." at the start of a line, YAML 1.2 §9.1), so that each document
// is parsed, and fails, alone. Documents of comments and directives only are left out.
func splitDocuments(data []byte) []document {
	var docs []document
	start, startLine, line, empty := 0, 0, 0, true
	cut := func(end, nextLine int) {
		if !empty {
			docs = append(docs, document{text: data[start:end], before: startLine})
		}
		start, startLine, empty = end, nextLine, true
	}
	data = bytes.TrimPrefix(data, []byte("\ufeff"))
	for pos := 0; pos < len(data); line++ {
		end := len(data)
		if i := bytes.IndexByte(data[pos:], '\n'); i >= 0 {
			end = pos + i + 1
		}
		text := bytes.TrimRight(data[pos:end], " \t\r\n")
		switch {
		case isMarker(text, "---"):
			cut(pos, line)
			rest := bytes.TrimLeft(text[3:], " \t")
			empty = len(rest) == 0 || rest[0] == '#'
		case isMarker(text, "..."):
			cut(pos, line)
			start, startLine = end, line+1
		default:
			content := bytes.TrimLeft(text, " \t")
			empty = empty && (len(content) == 0 || content[0] == '#' || text[0] == '%')
		}
		pos = end
	}
	cut(len(data), line)
	return docs
}

func isMarker(line []byte, marker string) bool {
	rest, ok := bytes.CutPrefix(line, []byte(marker))
	return ok && (len(rest) == 0 || rest[0] == ' ' || rest[0] == '\t')
}

// decoder decodes one file.
type decoder struct {
	file    string
	objects []Object
	faults  []*Fault

	fields  map[reflect.Type]map[string][]int // index of each field by JSON name
	aliased int                               // values reached through aliases so far

	// of the object at hand
	before int // lines before its document
	object string
	depth  int
	inside map[*yaml.Node]bool // aliases being expanded
}

func (d *decoder) fault(n *yaml.Node, path, reason string, args ...any) {
	f := &Fault{File: d.file, Object: d.object, Field: path, Reason: fmt.Sprintf(reason, args...)}
	if n != nil {
		f.Line = d.before + n.Line
		if n.Kind == yaml.ScalarNode {
			f.Value = shorten(n.Value)
		}
	}
	d.faults = append(d.faults, f)
}

func (d *decoder) document(doc document) {
	d.before, d.object = doc.before, ""
	text := doc.text
	if json.Valid(text) { // YAML 1.2 contains JSON but for tabs; JSON has none inside its strings
		text = bytes.ReplaceAll(text, []byte("\t"), []byte(" "))
	}
	var root yaml.Node
	if err := yaml.Unmarshal(text, &root); err != nil {
		d.syntax(doc, err)
		return
	}
	if root.Kind == yaml.DocumentNode && len(root.Content) == 1 {
		d.element(root.Content[0])
	}
}

var yamlError = regexp.MustCompile(`^yaml: (?:line \d+: )?`)

// syntax reports a document that does not parse. The parser names the line where the construct at fault begins, which may be
// far above; the fault is on the line after the longest run of whole lines that does parse.
func (d *decoder) syntax(doc document, err error) {
	lines := bytes.SplitAfter(doc.text, []byte("\n"))
	good, bad := 0, len(lines)
	for good+1 < bad {
		mid := (good + bad) / 2
		var n yaml.Node
		if yaml.Unmarshal(bytes.Join(lines[:mid], nil), &n) == nil {
			good = mid
		} else {
			bad = mid
		}
	}
	text := shorten(strings.TrimSpace(string(lines[good])))
	d.faults = append(d.faults, &Fault{File: d.file, Line: doc.before + good + 1, Value: text,
		Reason: "not YAML: " + yamlError.ReplaceAllString(err.Error(), "") + "; check indentation, quotes and colons here and on the line above"})
}

// element decodes an object, or the items of a List.
func (d *decoder) element(n *yaml.Node) {
	d.object = ""
	if n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" {
		return
	}
	if n.Kind != yaml.MappingNode {
		d.fault(n, "", "must be an object with apiVersion, kind and metadata")
		return
	}
	kindNode, versionNode := child(n, "kind"), child(n, "apiVersion")
	for _, field := range []string{"apiVersion", "kind"} {
		if c := child(n, field); c == nil || c.Kind != yaml.ScalarNode || c.Value == "" {
			d.fault(n, field, "must be given, as text")
			return
		}
	}
	if kindNode.Value == "List" && versionNode.Value == "v1" {
		d.list(n)
		return
	}
	if len(d.objects) == MaxObjects {
		d.fault(n, "", "more than %d objects in one file; split it", MaxObjects)
		return
	}
	kind, value, reason := newValue(kindNode.Value, versionNode.Value)
	if value == nil {
		at, field := kindNode, "kind"
		if strings.HasPrefix(reason, "apiVersion") {
			at, field = versionNode, "apiVersion"
		}
		d.fault(at, field, "%s", reason)
		return
	}

	key := Key{Kind: kind.Name}
	if m := child(n, "metadata"); m != nil && m.Kind == yaml.MappingNode {
		for field, to := range map[string]*string{"name": &key.Name, "namespace": &key.Namespace} {
			if c := child(m, field); c != nil && c.Kind == yaml.ScalarNode {
				*to = shorten(c.Value)
			}
		}
	}
	if kind.Namespaced {
		key.Namespace = cmp.Or(key.Namespace, "default")
	}
	d.object, d.inside = key.String(), map[*yaml.Node]bool{}
	before := len(d.faults)
	d.value(n, reflect.ValueOf(value).Elem(), "")
	if kind.Namespaced && value.GetNamespace() == "" {
		value.SetNamespace("default")
	}
	o := Object{Kind: kind.Name, Value: value, File: d.file, Line: d.before + n.Line}
	if len(d.faults) > before {
		return // what a half-read object means is not worth a second complaint
	}
	for _, f := range validate(o) {
		f.Line = d.before + lineOf(n, f.Field)
		d.faults = append(d.faults, f)
	}
	switch kind.Name {
	case "HTTPRoute", "GRPCRoute", "TLSRoute", "TCPRoute", "TrafficPolicy", "AccessPolicy":
		o.node = n
	}
	if len(d.faults) == before {
		d.objects = append(d.objects, o)
	}
}

func (d *decoder) list(n *yaml.Node) {
	d.object = "List"
	for i := 0; i+1 < len(n.Content); i += 2 {
		switch k := n.Content[i]; k.Value {
		case "apiVersion", "kind", "metadata", "items":
		default:
			d.fault(k, k.Value, "unknown field; a List has items")
		}
	}
	items := child(n, "items")
	if items == nil || items.Kind != yaml.SequenceNode {
		d.fault(n, "items", "must be a list of objects")
		return
	}
	for _, item := range items.Content {
		if item.Kind == yaml.MappingNode {
			if k := child(item, "kind"); k != nil && k.Value == "List" {
				d.fault(k, "kind", "a List inside a List; write its items here")
				continue
			}
		}
		d.element(item)
	}
}

// refuseDuplicates drops an object whose key was already used in the file.
func (d *decoder) refuseDuplicates() {
	first := make(map[Key]Object, len(d.objects))
	d.objects = slices.DeleteFunc(d.objects, func(o Object) bool {
		was, dup := first[o.Key()]
		if dup {
			d.faults = append(d.faults, Duplicate(o, was))
			return true
		}
		first[o.Key()] = o
		return false
	})
}

// Duplicate is the fault of o, whose key was already used by was.
func Duplicate(o, was Object) *Fault {
	where := fmt.Sprintf("on line %d", was.Line)
	if was.File != o.File {
		where = fmt.Sprintf("in %s on line %d", was.File, was.Line)
	}
	return &Fault{File: o.File, Line: o.Line, Object: o.Key().String(), Field: "metadata.name", Value: o.Value.GetName(),
		Reason: "already defined " + where + "; remove one of the two"}
}

// child returns the value of a key of a mapping, or nil. Keys that come by a merge (<<) are not seen.
func child(n *yaml.Node, key string) *yaml.Node {
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return n.Content[i+1]
		}
	}
	return nil
}

// value decodes n into v, which lies at path.
func (d *decoder) value(n *yaml.Node, v reflect.Value, path string) {
	if d.depth++; d.depth > maxDepth {
		d.fault(n, path, "nested deeper than %d levels", maxDepth)
	}
	if d.depth <= maxDepth {
		d.resolve(n, path, func(n *yaml.Node) { d.concrete(n, v, path) })
	}
	d.depth--
}

// resolve follows an alias, within bounds.
func (d *decoder) resolve(n *yaml.Node, path string, use func(*yaml.Node)) {
	if n.Kind != yaml.AliasNode {
		if len(d.inside) > 0 {
			d.aliased++
		}
		if d.aliased > maxAliased {
			if d.aliased == maxAliased+1 {
				d.aliased++
				d.fault(n, path, "more than %d values by alias (*name) in one file; write them out", maxAliased)
			}
			return
		}
		use(n)
		return
	}
	if d.inside[n.Alias] {
		d.fault(n, path, "alias *%s contains itself", n.Value)
		return
	}
	d.inside[n.Alias] = true
	d.resolve(n.Alias, path, use)
	delete(d.inside, n.Alias)
}

func (d *decoder) concrete(n *yaml.Node, v reflect.Value, path string) {
	if strings.HasPrefix(n.Tag, "!") && !strings.HasPrefix(n.Tag, "!!") {
		d.fault(n, path, "has the tag %s; remove it", shorten(n.Tag))
		return
	}
	if n.ShortTag() == "!!null" {
		return // as absent, like the Kubernetes API
	}
	if u, ok := v.Addr().Interface().(json.Unmarshaler); ok {
		if err := d.custom(n, u); err != nil {
			switch u.(type) {
			case *metav1.Time, *metav1.MicroTime:
				err = errors.New("must be a time such as 2026-01-02T15:04:05Z (RFC 3339)")
			}
			d.fault(n, path, "%s", err)
		}
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		d.concrete(n, v.Elem(), path)
	case reflect.Struct:
		d.structure(n, v, path)
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		for _, p := range d.pairs(n, path) {
			e := reflect.New(v.Type().Elem()).Elem()
			d.value(p.value, e, path+"["+p.key.Value+"]")
			v.SetMapIndex(reflect.ValueOf(p.key.Value).Convert(v.Type().Key()), e)
		}
	case reflect.Slice:
		d.slice(n, v, path)
	default:
		d.scalar(n, v, path)
	}
}

// custom decodes n by the type's own UnmarshalJSON.
func (d *decoder) custom(n *yaml.Node, u json.Unmarshaler) error {
	var plain any
	if err := n.Decode(&plain); err != nil {
		return errors.New(yamlError.ReplaceAllString(err.Error(), ""))
	}
	text, err := json.Marshal(plain)
	if err != nil {
		return err
	}
	return u.UnmarshalJSON(text)
}

func (d *decoder) slice(n *yaml.Node, v reflect.Value, path string) {
	if n.Kind != yaml.SequenceNode {
		d.fault(n, path, "must be a list, not %s", describe(n))
		return
	}
	if len(n.Content) > MaxEndpoints {
		d.fault(n, path, "%d entries; at most %d are allowed in one object: split it into several", len(n.Content), MaxEndpoints)
		return
	}
	v.Set(reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content)))
	for i, c := range n.Content {
		d.value(c, v.Index(i), fmt.Sprintf("%s[%d]", path, i))
	}
}

func (d *decoder) structure(n *yaml.Node, v reflect.Value, path string) {
	fields := d.fieldsOf(v.Type())
	for _, p := range d.pairs(n, path) {
		name := p.key.Value
		sub := name
		if path != "" {
			sub = path + "." + name
		}
		index, ok := fields[name]
		if !ok {
			d.faults = append(d.faults, &Fault{File: d.file, Line: d.before + p.key.Line, Object: d.object, Field: sub,
				Reason: "unknown field; " + suggest(name, slices.Sorted(maps.Keys(fields)))})
			continue
		}
		d.value(p.value, v.FieldByIndex(index), sub)
	}
}

func (d *decoder) scalar(n *yaml.Node, v reflect.Value, path string) {
	tag := n.ShortTag()
	switch v.Kind() {
	case reflect.String:
		if n.Kind == yaml.ScalarNode && (tag == "!!str" || tag == "!!timestamp") {
			v.SetString(n.Value)
			return
		}
		if n.Kind == yaml.ScalarNode {
			d.fault(n, path, "must be text; put it in quotes")
			return
		}
		d.fault(n, path, "must be text, not %s", describe(n))
	case reflect.Bool:
		if n.Kind != yaml.ScalarNode || tag != "!!bool" {
			d.fault(n, path, "must be true or false, not %s", describe(n))
			return
		}
		v.SetBool(strings.EqualFold(n.Value, "true"))
	case reflect.Int, reflect.Int32, reflect.Int64, reflect.Uint16:
		var i int64
		switch {
		case n.Kind != yaml.ScalarNode || tag != "!!int" && tag != "!!float":
			d.fault(n, path, "must be a whole number, not %s", describe(n))
		case tag == "!!float" || n.Decode(&i) != nil:
			d.fault(n, path, "must be a whole number within range")
		case v.CanInt() && !v.OverflowInt(i):
			v.SetInt(i)
		case v.CanUint() && i >= 0 && !v.OverflowUint(uint64(i)):
			v.SetUint(uint64(i))
		default:
			d.fault(n, path, "out of range")
		}
	default:
		d.fault(n, path, "cannot be set in a file")
	}
}

func describe(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	switch n.ShortTag() {
	case "!!str":
		return "text"
	case "!!int", "!!float":
		return "a number"
	case "!!bool":
		return "true or false"
	}
	return "this"
}

// pair is one entry of a mapping.
type pair struct{ key, value *yaml.Node }

// pairs lists the entries of a mapping, merges (<<) included, and reports keys that are given twice.
func (d *decoder) pairs(n *yaml.Node, path string) []pair {
	if n.Kind != yaml.MappingNode {
		d.fault(n, path, "must be a mapping, not %s", describe(n))
		return nil
	}
	own := make([]pair, 0, len(n.Content)/2)
	seen := make(map[string]int, len(n.Content)/2)
	var merges []*yaml.Node
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		switch line, dup := seen[k.Value]; {
		case k.Kind != yaml.ScalarNode:
			d.fault(k, path, "a key must be text")
		case k.ShortTag() == "!!merge":
			merges = append(merges, v)
		case dup:
			d.fault(k, join(path, k.Value), "given twice; first on line %d", line)
		default:
			seen[k.Value] = d.before + k.Line
			own = append(own, pair{k, v})
		}
	}
	for _, m := range merges {
		d.merge(m, path, func(p pair) {
			if _, ok := seen[p.key.Value]; !ok {
				seen[p.key.Value] = d.before + p.key.Line
				own = append(own, p)
			}
		})
	}
	return own
}

// merge yields the entries of a merged mapping or of a list of them (YAML 1.1 "merge").
func (d *decoder) merge(n *yaml.Node, path string, yield func(pair)) {
	if d.depth++; d.depth > maxDepth {
		d.fault(n, path, "nested deeper than %d levels", maxDepth)
	} else {
		d.resolve(n, path, func(n *yaml.Node) {
			if n.Kind == yaml.SequenceNode {
				for _, c := range n.Content {
					d.merge(c, path, yield)
				}
				return
			}
			for _, p := range d.pairs(n, path) {
				yield(p)
			}
		})
	}
	d.depth--
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// fieldsOf lists the fields of a struct by JSON name, with those of embedded structs (encoding/json's rules, as far as the
// Kubernetes types use them).
func (d *decoder) fieldsOf(t reflect.Type) map[string][]int {
	if fields, ok := d.fields[t]; ok {
		return fields
	}
	fields := map[string][]int{}
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case name == "-" || !f.IsExported():
		case name == "" && f.Anonymous && f.Type.Kind() == reflect.Struct:
			for n, sub := range d.fieldsOf(f.Type) {
				if _, shadowed := fields[n]; !shadowed {
					fields[n] = append([]int{i}, sub...)
				}
			}
		default:
			fields[cmp.Or(name, f.Name)] = []int{i}
		}
	}
	d.fields[t] = fields
	return fields
}

// suggest names the field that was probably meant, or all of them.
func suggest(name string, known []string) string {
	if best := closest(name, known); best != "" {
		return fmt.Sprintf("did you mean %s?", best)
	}
	return "known here are " + strings.Join(known, ", ")
}

// closest returns the one of known that is at most two edits away from name, or "".
func closest(name string, known []string) string {
	best, distance := "", 3
	for _, k := range known {
		if n := editDistance(strings.ToLower(name), strings.ToLower(k)); n < distance {
			best, distance = k, n
		}
	}
	return best
}

// editDistance counts the bytes to insert, delete or replace between a and b; 99 where they are clearly unlike.
func editDistance(a, b string) int {
	if len(a) > 64 || len(a)-len(b) > 2 || len(b)-len(a) > 2 {
		return 99
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			next := diagonal
			if a[i] != b[j] {
				next = 1 + min(diagonal, row[j], row[j+1])
			}
			diagonal, row[j+1] = row[j+1], next
		}
	}
	return row[len(b)]
}

// lineOf returns the line of the field at path, or of the deepest part of it that is written.
func lineOf(n *yaml.Node, path string) int {
	line := n.Line
	for path != "" {
		if n.Kind == yaml.AliasNode {
			n = n.Alias
		}
		var step string
		switch end := strings.IndexAny(path[1:], ".["); {
		case path[0] == '[':
			close := strings.IndexByte(path, ']')
			step, path = path[1:close], path[close+1:]
		case end >= 0:
			step, path = path[:end+1], path[end+1:]
		default:
			step, path = path, ""
		}
		path = strings.TrimPrefix(path, ".")
		next := (*yaml.Node)(nil)
		switch n.Kind {
		case yaml.SequenceNode:
			var i int
			if _, err := fmt.Sscanf(step, "%d", &i); err == nil && i < len(n.Content) {
				next = n.Content[i]
				line = next.Line
			}
		case yaml.MappingNode:
			for i := 0; i+1 < len(n.Content); i += 2 {
				if n.Content[i].Value == step {
					next, line = n.Content[i+1], n.Content[i].Line
				}
			}
		}
		if next == nil {
			return line
		}
		n = next
	}
	return line
}
