// Bundles what a module exports into one declaration file that needs no other: the package is installed without the packages that
// its sources are written with, so their types must not be mentioned.
import { dirname, resolve } from 'node:path'
import ts from 'typescript'

/** A top-level name of a file. */
interface Declared {
  readonly file: string
  readonly name: string
}

interface Declarations {
  readonly text: string
  readonly statements: ReadonlyMap<string, readonly ts.Statement[]>
  /** Names that stand for one of another file, imported or passed on. */
  readonly imported: ReadonlyMap<string, { readonly module: string; readonly name: string }>
  readonly exported: ReadonlyMap<string, { readonly module: string | undefined; readonly name: string }>
}

/**
 * Writes the exports of `entry` and all that their declarations mention. `replaced` has declarations, by exported name, that are
 * written instead of those in the sources.
 *
 * @throws Error naming a type of another package that would be mentioned
 */
export function bundleTypes(entry: string, replaced: ReadonlyMap<string, string>): string {
  const declarationsOf = emitDeclarations(entry)
  const names = new Map<string, string>()
  const taken = new Set<string>()
  const written: string[] = []

  /** Where a name of a file is declared; undefined for one of the language. */
  const find = (file: string, name: string): Declared | undefined => {
    const { statements, imported } = declarationsOf(file)
    if (statements.has(name)) return { file, name }
    const from = imported.get(name)
    return from && findExported(moduleFile(file, from.module), from.name)
  }
  const findExported = (file: string, name: string): Declared => {
    const { statements, exported } = declarationsOf(file)
    const from = exported.get(name)
    const found =
      from === undefined
        ? statements.has(name) && { file, name }
        : from.module === undefined
          ? find(file, from.name)
          : findExported(moduleFile(file, from.module), from.name)
    if (!found) throw new Error(`Cannot bundle types: ${file} exports no ${name}`)
    return found
  }

  /** The name of a declaration in the bundle; it is written when it is first asked for. */
  const nameOf = ({ file, name }: Declared): string => {
    const key = `${file} ${name}`
    const known = names.get(key)
    if (known !== undefined) return known
    let own = name
    for (let i = 2; taken.has(own); i++) own = `${name}${i}`
    taken.add(own)
    names.set(key, own)
    const { statements, text } = declarationsOf(file)
    written.push(
      replaced.get(name) ??
        (statements.get(name) ?? []).map((statement) => write(statement, text, file)).join('\n'),
    )
    return own
  }

  const write = (statement: ts.Statement, text: string, file: string): string => {
    const edits: { start: number; end: number; name: string }[] = []
    const visit = (node: ts.Node): void => {
      if (ts.isImportTypeNode(node))
        throw new Error(
          `Cannot bundle types: ${file} mentions ${node.getText()}; name the type in the source`,
        )
      if (ts.isIdentifier(node) && isMention(node)) {
        const declared = find(file, node.text)
        if (declared) edits.push({ start: node.getStart(), end: node.end, name: nameOf(declared) })
      }
      ts.forEachChild(node, visit)
    }
    visit(statement)
    const comment = (ts.getLeadingCommentRanges(text, statement.getFullStart()) ?? [])
      .map(({ pos, end }) => text.slice(pos, end))
      .filter((comment) => comment.startsWith('/**'))
      .at(-1)
    let body = ''
    let at = statement.getStart()
    for (const { start, end, name } of edits) {
      body += text.slice(at, start) + name
      at = end
    }
    body = (body + text.slice(at, statement.end)).replace(/^export (default )?/, '')
    return comment === undefined ? body : `${comment}\n${body}`
  }

  const exports = [...declarationsOf(entry).exported.keys()].map((name) => {
    const declared = findExported(entry, name)
    const isType = declarationsOf(declared.file)
      .statements.get(declared.name)
      ?.every((statement) => ts.isInterfaceDeclaration(statement) || ts.isTypeAliasDeclaration(statement))
    const own = nameOf(declared)
    return `${isType === true ? 'type ' : ''}${own === name ? name : `${own} as ${name}`}`
  })
  return [...written, `export { ${exports.join(', ')} };\n`].join('\n\n')
}

function moduleFile(from: string, module: string): string {
  if (!module.startsWith('.'))
    throw new Error(
      `Cannot bundle types: ${from} mentions a type of ${module}, which is not there once installed`,
    )
  return resolve(dirname(from), module.replace(/\.js$/, '.ts'))
}

/** An identifier that means a declaration, and is not the name of a member or of what it stands in. */
function isMention(node: ts.Identifier): boolean {
  const { parent } = node
  if (ts.isQualifiedName(parent)) return parent.left === node
  if (ts.isPropertyAccessExpression(parent)) return parent.expression === node
  if (ts.isBindingElement(parent) || ts.isParameter(parent) || ts.isTypeParameterDeclaration(parent))
    return false
  if (ts.isNamedTupleMember(parent)) return parent.name !== node
  if (ts.isPropertySignature(parent) || ts.isPropertyDeclaration(parent)) return parent.name !== node
  if (ts.isMethodSignature(parent) || ts.isMethodDeclaration(parent)) return parent.name !== node
  if (ts.isGetAccessor(parent) || ts.isSetAccessor(parent)) return parent.name !== node
  if (ts.isTypePredicateNode(parent)) return parent.parameterName !== node
  return true
}

/** Emits the declarations of one source after another, as they are asked for. */
function emitDeclarations(entry: string): (file: string) => Declarations {
  const configFile = ts.findConfigFile(dirname(entry), (file) => ts.sys.fileExists(file))
  if (configFile === undefined)
    throw new Error(`Cannot bundle types: there is no tsconfig.json above ${entry}`)
  const { config } = ts.readConfigFile(configFile, (file) => ts.sys.readFile(file)) as { config: unknown }
  const { options } = ts.parseJsonConfigFileContent(config, ts.sys, dirname(configFile))
  const program = ts.createProgram([entry], {
    ...options,
    noEmit: false,
    declaration: true,
    emitDeclarationOnly: true,
    noCheck: true,
  })
  const known = new Map<string, Declarations>()
  return (file) => {
    const there = known.get(file)
    if (there) return there
    let text: string | undefined
    program.emit(
      program.getSourceFile(file),
      (name, emitted) => {
        if (name.endsWith('.d.ts')) text = emitted
      },
      undefined,
      true,
    )
    if (text === undefined) throw new Error(`Cannot bundle types: no declarations were made of ${file}`)
    const read = readDeclarations(ts.createSourceFile(file, text, ts.ScriptTarget.ESNext, true))
    known.set(file, read)
    return read
  }
}

function readDeclarations(source: ts.SourceFile): Declarations {
  const statements = new Map<string, ts.Statement[]>()
  const imported = new Map<string, { module: string; name: string }>()
  const exported = new Map<string, { module: string | undefined; name: string }>()
  const moduleOf = (specifier: ts.Expression | undefined) =>
    specifier && ts.isStringLiteral(specifier) ? specifier.text : undefined
  for (const statement of source.statements) {
    const module =
      ts.isImportDeclaration(statement) || ts.isExportDeclaration(statement)
        ? moduleOf(statement.moduleSpecifier)
        : undefined
    if (ts.isImportDeclaration(statement)) {
      const { name, namedBindings } = statement.importClause ?? {}
      if (name) imported.set(name.text, { module: module ?? '', name: 'default' })
      if (namedBindings && ts.isNamespaceImport(namedBindings))
        imported.set(namedBindings.name.text, { module: module ?? '', name: '*' })
      else
        for (const { name: own, propertyName } of namedBindings?.elements ?? [])
          imported.set(own.text, { module: module ?? '', name: (propertyName ?? own).text })
    } else if (ts.isExportDeclaration(statement)) {
      if (statement.exportClause && ts.isNamedExports(statement.exportClause))
        for (const { name, propertyName } of statement.exportClause.elements)
          exported.set(name.text, { module, name: (propertyName ?? name).text })
    } else {
      for (const name of declaredNames(statement)) {
        statements.set(name, [...(statements.get(name) ?? []), statement])
        const isExported =
          ts.canHaveModifiers(statement) &&
          ts.getModifiers(statement)?.some(({ kind }) => kind === ts.SyntaxKind.ExportKeyword)
        if (isExported === true) exported.set(name, { module: undefined, name })
      }
    }
  }
  return { text: source.text, statements, imported, exported }
}

function declaredNames(statement: ts.Statement): string[] {
  if (ts.isVariableStatement(statement))
    return statement.declarationList.declarations.map(({ name }) => name.getText())
  if (
    ts.isInterfaceDeclaration(statement) ||
    ts.isTypeAliasDeclaration(statement) ||
    ts.isClassDeclaration(statement) ||
    ts.isFunctionDeclaration(statement)
  )
    return statement.name ? [statement.name.text] : []
  return []
}
